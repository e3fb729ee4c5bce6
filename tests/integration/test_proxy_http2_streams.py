"""Streams of HTTP/2 clients: early hints, resets, goodbyes, back-pressure, bounds, malformed requests."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from app_rig import app
from h2.errors import ErrorCodes
from h2.events import DataReceived, InformationalResponseReceived, ResponseReceived, StreamEnded, StreamReset
from http2_rig import Speaker, connected, text
from mesh_rig import HOST
from proxy_rig import WITHIN_S, Rig, row, running

from pantala.testing.poll import until
from pantala.wire.feed import Load
from pantala.wire.machine import HTTPOptions

pytestmark = pytest.mark.anyio
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PART = bytes(64 * 1024)
LARGE = 24 * 1024 * 1024
"""More than all sockets and buffers on the way hold."""
PAGE = ("accept", "text/html")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
        yield rig


async def others(one: Speaker) -> None:
    """The proxy has time for other things, on the same connection."""
    for _ in range(5):
        assert (await one.head(one.ask(("host", "nobody.test"))))[":status"] == "400"


async def in_flight(rig: Rig, number: int) -> None:
    async def told() -> int:
        loads = [frame for frame in rig.agent.frames if isinstance(frame, Load)]
        return sum(load.in_flight for load in loads[-1].machines) if loads else 0

    await until(told, lambda now: now == number, within_s=WITHIN_S, every_s=0.01)


# -- early hints -------------------------------------------------------------------------------------------------

HINT = b"HTTP/1.1 103 Early Hints\r\nLink: </%d.css>; rel=preload\r\nConnection: x\r\nX: y\r\n\r\n"


async def test_early_hints_come_before_the_answer(rig: Rig) -> None:
    go = asyncio.Event()

    async def hinting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(HINT % 1)
            await writer.drain()
            await go.wait()
            go.clear()
            writer.write(HINT % 2 + HINT % 3 + PLAIN)

    async with app(rig, hinting), connected(rig) as one:
        for _ in range(2):
            stream = one.ask(PAGE)
            first = await anext(one.events(stream))
            assert isinstance(first, InformationalResponseReceived), "while the app is still at it"
            go.set()
            *early, head, data, end = await one.all(stream)
            expected = [{":status": "103", "link": f"</{number}.css>; rel=preload"} for number in (1, 2, 3)]
            assert [text(hint.headers) for hint in early] == expected  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            assert isinstance(head, ResponseReceived)
            assert text(head.headers)[":status"] == "200"
            assert isinstance(data, DataReceived)
            assert (data.data, type(end)) == (b"ok", StreamEnded)


async def test_early_hints_are_for_pages(rig: Rig) -> None:
    async def hinting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HINT % 1 + PLAIN)

    async with app(rig, hinting), connected(rig) as one:
        first = await anext(one.events(one.ask(("accept", "application/json"))))
        assert isinstance(first, ResponseReceived)


async def test_hints_without_end_are_cut_short(rig: Rig) -> None:
    async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for number in range(2_000):
            writer.write(HINT % number)
            await writer.drain()
        writer.write(PLAIN)

    async with app(rig, chatty), connected(rig) as one:
        heard = await one.all(one.ask(PAGE))
        hints = [event for event in heard if isinstance(event, InformationalResponseReceived)]
        assert 100 < len(hints) < 1_000
        assert isinstance(heard[-1], StreamEnded)


# -- Expect: 100-continue ----------------------------------------------------------------------------------------


async def test_the_body_is_asked_for_when_the_app_asks(rig: Rig) -> None:
    async def picky(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"expect: 100-continue" in (await reader.readuntil(b"\r\n\r\n")).lower()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
        writer.write(PLAIN)

    async with app(rig, picky), connected(rig) as one:
        stream = one.ask(("expect", "100-continue"), ("content-length", "5"), method="PUT")
        told = await anext(one.events(stream))
        assert isinstance(told, InformationalResponseReceived)
        assert text(told.headers) == {":status": "100"}
        one.say(stream, b"hello", end=True)
        assert text((await one.all(stream))[1].headers)[":status"] == "200"  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


async def test_an_app_that_refuses_by_its_head_alone_is_passed_through(rig: Rig) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
        assert await reader.read() == b"", "not a byte of the body"

    async with app(rig, refuse), connected(rig) as one:
        stream = one.ask(("expect", "100-continue"), ("content-length", "5"), method="PUT")
        head, data, *_ = await one.all(stream)
        assert isinstance(head, ResponseReceived), "nobody asked for the body"
        assert text(head.headers)[":status"] == "413"
        assert isinstance(data, DataReceived)
        assert data.data == b"big"


# -- ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closes", [False, True], ids=["a reset", "the end of the connection"])
@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "within the answer"])
async def test_a_client_that_leaves_gives_the_request_up(rig: Rig, *, begun: bool, closes: bool) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if begun:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        asked.set()
        assert await reader.read() == b""
        gone.set()

    async with app(rig, hang), connected(rig) as one:
        stream = one.ask()
        await asyncio.wait_for(asked.wait(), WITHIN_S)
        if begun:
            await one.head(stream)
        await in_flight(rig, 1)
        if closes:
            one.close()
        else:
            one.h2.reset_stream(stream, ErrorCodes.CANCEL)
            one.flush()
        await asyncio.wait_for(gone.wait(), WITHIN_S)
        await in_flight(rig, 0)
        if not closes:
            await others(one)


async def test_a_flood_of_resets_leaves_nothing_behind(rig: Rig) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/calm" in await reader.readuntil(b"\r\n\r\n"):
            writer.write(PLAIN)
        await reader.read()

    async with app(rig, hang):
        async with connected(rig) as one:
            for _ in range(200):
                stream = one.h2.get_next_available_stream_id()
                head = [(":method", "GET"), (":authority", HOST), (":scheme", "https"), (":path", "/")]
                one.h2.send_headers(stream, head, end_stream=True)
                one.h2.reset_stream(stream, ErrorCodes.CANCEL)
            one.flush()
            await until(one.over, bool, within_s=WITHIN_S, every_s=0.01)
            assert one.goaways == [ErrorCodes.ENHANCE_YOUR_CALM]
        await in_flight(rig, 0)
        async with connected(rig) as one:
            assert (await one.head(one.ask(path="/calm")))[":status"] == "200"


async def test_a_leaving_proxy_says_goodbye_and_ends_what_is_under_way(rig: Rig) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await go.wait()
        writer.write(PLAIN)

    async with app(rig, slow), connected(rig) as one:
        stream = one.ask()
        await asyncio.wait_for(asked.wait(), WITHIN_S)
        assert rig.process is not None
        rig.process.send_signal(signal.SIGTERM)
        goaways = await until(one.left, bool, within_s=WITHIN_S, every_s=0.01)
        assert set(goaways) == {ErrorCodes.NO_ERROR}
        assert not await one.over()
        go.set()
        head, body, _ = await one.answer(stream)
        assert (head[":status"], body) == ("200", b"ok")
        await until(one.over, bool, within_s=WITHIN_S, every_s=0.01)
        assert await rig.stop() == 0


async def test_an_idle_connection_is_told_goodbye(rig: Rig) -> None:
    async def quick(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN)

    async with app(rig, quick, HTTPOptions(idle_timeout=1)), connected(rig) as one:
        assert (await one.answer(one.ask()))[1] == b"ok"
        await until(one.over, bool, within_s=WITHIN_S, every_s=0.01)
        assert set(one.goaways) == {ErrorCodes.NO_ERROR}


async def test_an_answer_that_breaks_off_is_reset(rig: Rig) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

    async with app(rig, half), connected(rig) as one:
        end = (await one.all(one.ask()))[-1]
        assert isinstance(end, StreamReset)
        assert end.error_code == ErrorCodes.INTERNAL_ERROR
        await in_flight(rig, 0)
        await others(one)


async def test_a_websocket_whose_client_resets_it_ends_at_the_app(rig: Rig) -> None:
    gone = asyncio.Event()

    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        assert await reader.read() == b""
        gone.set()

    async with app(rig, switch), connected(rig) as one:
        stream = one.ask((":protocol", "websocket"), ("sec-websocket-version", "13"), method="CONNECT")
        assert (await one.head(stream))[":status"] == "200"
        one.h2.reset_stream(stream, ErrorCodes.CANCEL)
        one.flush()
        await asyncio.wait_for(gone.wait(), WITHIN_S)
        await in_flight(rig, 0)


# -- back-pressure -----------------------------------------------------------------------------------------------


async def test_a_client_that_takes_nothing_slows_the_app_down(rig: Rig) -> None:
    written = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n".encode())
        for _ in range(LARGE // len(PART)):
            writer.write(PART)
            await writer.drain()
        written.set()

    async with app(rig, flood), connected(rig) as one:
        one.takes = False
        stream = one.ask()
        window = one.h2.remote_flow_control_window(stream)
        assert await size(one, stream, window) == window
        for _ in range(20):
            assert await rig.admin("/healthz") == "ok\n"
        assert not written.is_set()
        one.takes = True
        one.h2.acknowledge_received_data(window, stream)
        one.flush()
        assert await size(one, stream, LARGE) == LARGE
        await asyncio.wait_for(written.wait(), WITHIN_S)


async def size(one: Speaker, stream: int, wanted: int) -> int:
    """Of the data that came, once it is as much."""
    came = 0
    async for event in one.events(stream):
        came += len(event.data or b"") if isinstance(event, DataReceived) else 0
        if came >= wanted:
            break
    return came


async def test_an_app_that_takes_nothing_slows_the_client_down(rig: Rig) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def lazy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert f"content-length: {LARGE}".encode() in head.lower()
        asked.set()
        await go.wait()
        await reader.readexactly(LARGE)
        writer.write(PLAIN)

    async with app(rig, lazy), connected(rig) as one:
        stream = one.ask(("content-length", str(LARGE)), method="POST")
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < LARGE:
                room = await until(lambda: one.room(stream), bool, within_s=WITHIN_S, every_s=0.005)
                size = min(room, one.h2.max_outbound_frame_size, LARGE - sent)
                sent += size
                one.say(stream, bytes(size), end=sent == LARGE)

        sending = asyncio.create_task(send())
        await asyncio.wait_for(asked.wait(), WITHIN_S)
        await others(one)
        assert sent < LARGE
        go.set()
        head, body, _ = await one.answer(stream)
        assert (head[":status"], body) == ("200", b"ok")
        await sending


# -- heads -------------------------------------------------------------------------------------------------------


async def test_what_a_client_is_told_of_our_bounds(rig: Rig) -> None:
    async with connected(rig) as one:
        settings = one.h2.remote_settings
        assert (settings.max_concurrent_streams, settings.max_header_list_size) == (250, 64 * 1024)
        head = await one.head(one.ask(("x-large", "x" * 70_000)))
        assert head[":status"] == "431"
        await others(one)


async def test_the_answer_to_head_has_no_body(rig: Rig) -> None:
    async with connected(rig) as one:
        for method, data in (("HEAD", False), ("GET", True)):
            head, *heard = await one.all(one.ask(("accept", "text/plain"), ("host", "nobody.test"), method=method))
            assert isinstance(head, ResponseReceived)
            assert int(text(head.headers)["content-length"]) > 0
            assert any(isinstance(event, DataReceived) for event in heard) == data


async def test_every_answer_has_one_date(rig: Rig) -> None:
    said = "Sun, 06 Nov 1994 08:49:37 GMT"

    async def dated(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        date = f"Date: {said}\r\n" if b"/dated" in head else ""
        writer.write(f"HTTP/1.1 200 OK\r\n{date}Content-Length: 0\r\n\r\n".encode())

    async with app(rig, dated), connected(rig) as one:
        assert (await one.head(one.ask(path="/dated")))["date"] == said
        ours = (await one.head(one.ask(path="/")))["date"]
        assert ours.endswith(" GMT")
        assert ours != said


@pytest.mark.parametrize(
    "fields",
    [(("host", "other.test"),), (("host", HOST), ("host", HOST)), (("x_forwarded_for", "1"),)],
    ids=["another host", "two hosts", "an alias"],
)
async def test_an_ambiguous_request_is_refused(rig: Rig, fields: tuple[tuple[str, str], ...]) -> None:
    async with connected(rig) as one:
        assert (await one.head(one.ask(*fields)))[":status"] == "400"


@pytest.mark.parametrize("lengths", [("5",), ("1",), ("3", "4"), ("three",)], ids=["less", "more", "two", "no number"])
async def test_a_body_of_another_length_is_malformed(rig: Rig, lengths: tuple[str, ...]) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with app(rig, never), connected(rig) as one:
        stream = one.ask(*(("content-length", length) for length in lengths), method="POST")
        one.say(stream, b"abc", end=True)
        end = (await one.all(stream))[-1]
        assert isinstance(end, StreamReset)
        assert end.error_code == ErrorCodes.PROTOCOL_ERROR
        await in_flight(rig, 0)
        await others(one)
