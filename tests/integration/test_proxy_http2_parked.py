"""HTTP/2 connections that are quiet are parked: what was said before still holds when their clients speak again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest
from app_rig import app
from h2.errors import ErrorCodes
from h2.events import PingAckReceived
from http2_rig import Speaker, connected
from mesh_rig import HOST
from proxy_rig import WITHIN_S, Backend, Request, Rig, answer, app_rows, machine_row, row, running, service_row
from test_proxy_parked import QUIET_AFTER_S, gauge, parked

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.machine import HTTPOptions, Port

pytestmark = pytest.mark.anyio
IP = "127.0.6.8"
WINDOW = 1024 * 1024
"""What a client may send before it is told more."""
CLIENTS = 12


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path, drain_max_ms=20_000) as rig:
        await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
        yield rig


async def say_what_came(_: Backend, request: Request) -> bytes:
    """As many bytes as asked for, or the fields that begin with x- and how much was in the body."""
    if request.path.startswith("/bytes/"):
        return answer(bytes(int(request.path.removeprefix("/bytes/"))))
    own = [field for field in request.headers if field[0].startswith("x-own")]
    return answer(json.dumps([sorted(own), len(request.body)]).encode(), "200 OK", "X-Path: " + request.path)


async def web(rig: Rig, options: HTTPOptions | None = None) -> None:
    port = free_port()
    await rig.backend("web", IP, port, say_what_came)
    ports = [Port(port=rig.ports.https, handlers=["tls", "http"], http_options=options)]
    await rig.agent.rows(
        *app_rows("web", HOST), service_row(rig.ports, "web", port, ports=ports), machine_row("web", "m1", IP)
    )


@contextlib.asynccontextmanager
async def clients(rig: Rig, number: int = CLIENTS) -> AsyncGenerator[list[Speaker]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(rig)) for _ in range(number)]


async def asked(one: Speaker, fields: list[tuple[str, str]], path: str = "/") -> None:
    head, body, _ = await one.answer(one.ask(*fields, path=path))
    assert (head[":status"], head["x-path"]) == ("200", path)
    assert json.loads(body) == [sorted([list(field) for field in fields if field[0].startswith("x-own")]), 0]


def some_fields(dice: random.Random, number: int) -> list[tuple[str, str]]:
    """Names and values that come again and values that do not, more than a table holds."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 <>{}~|%&/=;:,\\^$*"
    own = [
        (f"x-own-{dice.randrange(20)}-{at}", "".join(dice.choices(letters, k=dice.randrange(1, 200))).strip() or "x")
        for at in range(number)
    ]
    return [*own, ("user-agent", "one that stays"), ("cookie", f"id={dice.random()}")]


async def test_a_quiet_connection_serves_again_and_again(rig: Rig) -> None:
    await web(rig)
    dice = random.Random(7541)
    async with clients(rig) as all_:
        stay = [some_fields(dice, index) for index in range(CLIENTS)]
        for _ in range(3):
            for index, one in enumerate(all_):
                for number in (0, 3, 12):
                    await asked(one, stay[index] + some_fields(dice, number)[:number], f"/{dice.random()}")
            await parked(rig, CLIENTS)
            assert await gauge(rig, "connections_open") == CLIENTS
        # All at once, and several on each.
        streams = [(one, [one.ask(*stay[index]) for _ in range(5)]) for index, one in enumerate(all_)]
        for one, of_one in streams:
            for stream in of_one:
                assert (await one.answer(stream))[0][":status"] == "200"
    await parked(rig, 0)


@pytest.mark.parametrize("settings", [{}, {1: 0, 4: 100, 5: 20_000}, {1: 65_536, 4: 1 << 20}], ids=str)
async def test_both_ends_send_no_more_than_they_may(rig: Rig, settings: dict[int, int]) -> None:
    """What they may still send is counted on; the client's own h2 fails if the proxy sends more."""
    await web(rig)
    async with clients(rig, 2) as (few, much):
        much.h2.increment_flow_control_window(1 << 20)
        for one in (few, much):
            one.h2.update_settings(settings)  # pyright: ignore[reportArgumentType]
            one.flush()
        for size in (30_000, 1, 200_000):
            for one in (few, much):
                _, body, _ = await one.answer(one.ask(path=f"/bytes/{size}"))
                assert len(body) == size
                # Less than the proxy would make room for at once.
                stream = one.ask(("content-length", "300000"), method="POST")
                for _ in range(30):
                    one.say(stream, bytes(10_000))
                one.say(stream, b"", end=True)
                assert (await one.answer(stream))[1] == b"[[], 300000]"
            await parked(rig, 2)
            for one in (few, much):
                assert one.h2.outbound_flow_control_window == WINDOW


async def test_no_frame_is_lost_at_the_moment_of_parking(rig: Rig) -> None:
    """Requests over the tenth of a second around that moment, which comes some time after the answer."""
    await web(rig)
    number = 40

    async def converse(index: int, one: Speaker) -> None:
        await asked(one, [("x-own", "first")])
        await asyncio.sleep(QUIET_AFTER_S - 0.05 + index * 0.1 / number)
        await asked(one, [("x-own", "second")])
        await asked(one, [("x-own", "first")])

    async with clients(rig, number) as all_:
        await asyncio.wait_for(asyncio.gather(*(converse(*one) for one in enumerate(all_))), WITHIN_S)


async def test_what_is_late_or_about_the_connection_wakes_it(rig: Rig) -> None:
    await web(rig)
    async with clients(rig, 1) as (one,):
        await asked(one, [("x-own", "1")])
        stream = one.ask(path="/bytes/5000")
        assert len((await one.answer(stream))[1]) == 5000
        await parked(rig, 1)
        frames = (
            bytes.fromhex("000004 08 00 00000001 00000100")  # WINDOW_UPDATE of the first stream
            + bytes.fromhex("000004 03 00 00000003 00000008")  # RST_STREAM of the last one
            + bytes.fromhex("000005 02 00 00000001 0000000010")  # PRIORITY
            + bytes.fromhex("000003 fe 00 00000000 616263")  # of a kind that nobody knows
            + bytes.fromhex("000006 04 00 00000000 0004 00020000")  # SETTINGS
        )
        one.raw(frames)
        await parked(rig, 0)
        one.h2.ping(b"12345678")
        one.flush()
        await until(one.heard, lambda seen: any(isinstance(e, PingAckReceived) for e in seen), within_s=WITHIN_S)
        await asked(one, [("x-own", "1"), ("x-own-2", "2")])
        await parked(rig, 1)
        await asked(one, [("x-own", "1"), ("x-own-2", "2")])


async def test_a_connection_with_something_under_way_stays(rig: Rig) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):  # its connection may be kept for the next request
                if b"upgrade: websocket" in head.lower():
                    writer.write(
                        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
                    )
                    writer.write(await reader.readexactly(5))
                else:
                    await go.wait()
                    writer.write(answer(b"ok"))

    async with app(rig, slow), clients(rig, 4) as (request, tunnel, part, free):
        waiting = request.ask()
        socket = tunnel.ask((":protocol", "websocket"), ("sec-websocket-version", "13"), method="CONNECT")
        assert (await tunnel.head(socket))[":status"] == "200"
        part.raw(bytes.fromhex("000008 06 00 00000000 1234"))  # of a PING
        await parked(rig, 1)  # the one that is free: it has asked for nothing yet
        tunnel.say(socket, b"hello")
        assert await tunnel.data(socket, 5) == b"hello"
        go.set()
        assert (await request.answer(waiting))[1] == b"ok"
        part.raw(bytes(6))
        await parked(rig, 3)
        assert (await free.answer(free.ask()))[1] == b"ok"


# -- the end -----------------------------------------------------------------------------------------------------


async def test_the_idle_timeout_goes_on(rig: Rig) -> None:
    await web(rig, HTTPOptions(idle_timeout=4))
    async with clients(rig, 2) as all_:
        for one in all_:
            await asked(one, [])
        await parked(rig, 2)
        for one in all_:
            await until(one.over, bool, within_s=WITHIN_S)
            assert set(one.goaways) == {ErrorCodes.NO_ERROR}
        assert await gauge(rig, "connections_open") == 0


async def test_a_proxy_that_ends_says_goodbye(rig: Rig) -> None:
    await web(rig)
    async with clients(rig) as all_:
        for one in all_:
            await asked(one, [])
        await parked(rig, CLIENTS)
        leaving = asyncio.create_task(rig.stop())
        await until(lambda: rig.admin("/healthz"), lambda said: said == "leaving\n", within_s=WITHIN_S, every_s=0.01)
        for one in all_[:4]:
            await asked(one, [("x-own", "late")])
        for one in all_:
            await until(one.over, bool, within_s=WITHIN_S, every_s=0.01)
            assert set(one.goaways) == {ErrorCodes.NO_ERROR}
        assert await leaving == 0
