"""HTTP/1 connections that are quiet are parked: they weigh little, and whatever comes next finds them as they were."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest
from mesh_rig import Reader, talk
from proxy_rig import WITHIN_S, Backend, Request, Rig, answer, app_rows, machine_row, row, running, service_row
from test_proxy_replace import Replaced

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.machine import HTTPOptions, Port

pytestmark = pytest.mark.anyio
HOST = "web.apps.test"
IP = "127.0.6.7"
QUIET_AFTER_S = 2.0
CLIENTS = 12


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path, drain_max_ms=20_000) as rig:
        await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
        yield rig


async def say_path(backend: Backend, request: Request) -> bytes:
    return answer(request.path.encode() + request.body)


async def web(rig: Rig, options: HTTPOptions | None = None) -> Backend:
    port = free_port()
    backend = await rig.backend("web", IP, port, say_path)
    ports = [
        Port(port=rig.ports.http, handlers=["http"], http_options=options),
        Port(port=rig.ports.https, handlers=["tls", "http"], http_options=options),
    ]
    await rig.agent.rows(
        *app_rows("web", HOST), service_row(rig.ports, "web", port, ports=ports), machine_row("web", "m1", IP)
    )
    return backend


@contextlib.asynccontextmanager
async def client(rig: Rig, *, tls: bool = True) -> AsyncGenerator[Reader]:
    if not tls:
        async with talk(rig.address, rig.ports.http) as one:
            yield one
        return
    reader, writer = await asyncio.open_connection(
        rig.address, rig.ports.https, ssl=rig.ca.context("http/1.1"), server_hostname=HOST
    )
    try:
        yield Reader(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def clients(rig: Rig, number: int = CLIENTS) -> AsyncGenerator[list[Reader]]:
    """Every other one over TLS."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(client(rig, tls=index % 2 == 0)) for index in range(number)]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


async def answered(one: Reader, path: str, more: bytes = b"") -> bytes:
    """The head of the answer."""
    head = await one.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    wanted = path.encode() + more
    assert await one.exactly(len(wanted)) == wanted
    return head


async def gauge(rig: Rig, name: str) -> int:
    text = await rig.admin("/metrics") or ""
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"pantala_proxy_{name} "))


async def parked(rig: Rig, number: int) -> None:
    async def look() -> int:
        return await gauge(rig, "connections_parked")

    await until(look, lambda seen: seen == number, within_s=WITHIN_S)


# -- what comes next ---------------------------------------------------------------------------------------------


async def test_a_quiet_connection_serves_again_and_again(rig: Rig) -> None:
    backend = await web(rig)
    async with clients(rig) as all_:
        for round_ in range(2):
            for index, one in enumerate(all_):
                path = f"/{round_}/{index}"
                await one.say(get(path) + get(path + "/pipelined"))
                await answered(one, path)
                await answered(one, path + "/pipelined")
            await parked(rig, CLIENTS)
            assert await gauge(rig, "connections_open") == CLIENTS
        body = b"POST /body HTTP/1.1\r\nHost: %s\r\nContent-Length: 3\r\n\r\nabc" % HOST.encode()
        await all_[0].say(body)
        await answered(all_[0], "/body", b"abc")
        upgrade = get("/socket")[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        for one in all_[1:3]:
            await one.say(upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            assert b" 101 " in await one.until(b"\r\n\r\n")
            await one.say(b"\x82\x05hello")
            assert await one.exactly(7) == b"\x82\x05hello"
        await parked(rig, CLIENTS - 2)
    await parked(rig, 0)  # their clients left
    assert len(backend.requests) == CLIENTS * 4 + 3


async def test_no_byte_is_lost_at_the_moment_of_parking(rig: Rig) -> None:
    """Requests in two parts, some of them two at once, over the tenth of a second around that moment."""
    await web(rig)
    number = 50

    async def converse(index: int, one: Reader) -> None:
        await one.say(get("/first"))
        await answered(one, "/first")
        await asyncio.sleep(QUIET_AFTER_S - 0.05 + index * 0.1 / number)
        both = get(f"/{index}") + get("/after")
        cut = index * len(both) // number
        await one.say(both[:cut])
        await asyncio.sleep(0)
        await one.say(both[cut:])
        await answered(one, f"/{index}")
        await answered(one, "/after")

    async with clients(rig, number) as all_:
        await asyncio.wait_for(asyncio.gather(*(converse(*one) for one in enumerate(all_))), WITHIN_S)


async def test_the_beginning_of_a_head_is_kept(rig: Rig) -> None:
    await web(rig)
    async with clients(rig, 2) as both, client(rig) as other:
        for one in both:
            await one.say(get("/one") + get("/two")[:9])
            await answered(one, "/one")
        await other.say(get("/other"))
        await answered(other, "/other")
        await parked(rig, 1)  # the other one, which was quiet later
        for one in both:
            await one.say(get("/two")[9:])
            await answered(one, "/two")
        await parked(rig, 3)


async def test_a_body_that_outlives_its_answer_keeps_the_connection_busy(rig: Rig) -> None:
    """The app answers early and reads on."""
    came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"ok"))
        with contextlib.suppress(asyncio.IncompleteReadError):
            came.set_result(await reader.readexactly(6))
            await reader.read()
        writer.close()

    await web(rig)
    port = free_port()
    async with await asyncio.start_server(early, IP, port), client(rig) as one, client(rig) as other:
        await rig.agent.rows(*app_rows("early", "early.test"), service_row(rig.ports, "early", port))
        await rig.agent.rows(machine_row("early", "m2", IP))
        await one.say(b"POST / HTTP/1.1\r\nHost: early.test\r\nContent-Length: 6\r\n\r\nabc")
        await one.until(b"\r\n\r\nok")
        await other.say(get("/other"))
        await answered(other, "/other")
        await parked(rig, 1)
        await one.say(b"def")
        assert await asyncio.wait_for(came, WITHIN_S) == b"abcdef"
        await one.say(get("/next"))
        await answered(one, "/next")


# -- the end -----------------------------------------------------------------------------------------------------


async def test_the_idle_timeout_goes_on(rig: Rig) -> None:
    await web(rig, HTTPOptions(idle_timeout=4))
    async with clients(rig, 2) as both:
        for one in both:
            await one.say(get("/one"))
            await answered(one, "/one")
        await parked(rig, 2)
        for one in both:
            assert await one.rest() == b""
        await parked(rig, 0)
        assert await gauge(rig, "connections_open") == 0


async def test_a_proxy_that_ends_answers_and_closes(rig: Rig) -> None:
    await web(rig)
    async with clients(rig) as all_:
        for one in all_:
            await one.say(get("/one"))
            await answered(one, "/one")
        await parked(rig, CLIENTS)
        leaving = asyncio.create_task(rig.stop())
        await until(lambda: rig.admin("/healthz"), lambda said: said == "leaving\n", within_s=WITHIN_S, every_s=0.01)
        for one in all_[:4]:
            await one.say(get("/two"))
            assert b"connection: close" in await answered(one, "/two")
        for one in all_:
            assert await one.rest() == b""
        assert await leaving == 0


async def test_a_replaced_proxy_answers_and_closes(rig: Rig) -> None:
    await web(rig)
    replaced = Replaced(rig)
    try:
        async with clients(rig) as all_:
            for one in all_:
                await one.say(get("/one"))
                await answered(one, "/one")
            await parked(rig, CLIENTS)
            await replaced.replace()
            for one in all_[:4]:
                await one.say(get("/two"))
                await answered(one, "/two")
            for one in all_:
                assert await one.rest() == b""
            assert await asyncio.wait_for(replaced.old[0].wait(), WITHIN_S) == 0
            async with client(rig) as new:
                await new.say(get("/new"))
                await answered(new, "/new")
                await parked(rig, 1)
    finally:
        await replaced.close()
