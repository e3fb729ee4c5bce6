"""HTTP/1 in all its manners: 1.0, `Expect`, early hints, streams, trailers, slow and idle connections, large bodies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from app_rig import Talk, app
from mesh_rig import HOST, Reader, talk
from proxy_rig import Rig, running

from pantala.testing.poll import until
from pantala.wire.machine import HTTPOptions

pytestmark = pytest.mark.anyio
HEAD = f"Host: {HOST}\r\n"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        yield rig


def client(rig: Rig) -> contextlib.AbstractAsyncContextManager[Reader]:
    return talk(rig.address, rig.ports.http)


def says(*answers: bytes) -> Talk:
    """One fixed answer after the other, each to the head of a request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for one in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(one)
        await reader.read()

    return serve


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


# -- 1.0 ---------------------------------------------------------------------------------------------------------


async def test_no_chunks_for_a_client_of_http_1_0(rig: Rig) -> None:
    async with app(rig, says(CHUNKED)):
        head, _, body = (await rig.raw(f"GET / HTTP/1.0\r\n{HEAD}\r\n".encode())).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK")
    assert b"transfer-encoding" not in head.lower()
    assert body == b"onetwo", "the end of the connection is the end of the body"


async def test_http_1_0_keeps_a_connection_only_when_asked(rig: Rig) -> None:
    async with app(rig, says(PLAIN, PLAIN, PLAIN)):
        async with client(rig) as one:
            for _ in range(2):
                await one.say(f"GET / HTTP/1.0\r\n{HEAD}Connection: keep-alive\r\n\r\n".encode())
                assert b"connection: keep-alive" in (await one.until(b"\r\n\r\n")).lower()
                assert await one.exactly(2) == b"ok"
        assert (await rig.raw(f"GET / HTTP/1.0\r\n{HEAD}\r\n".encode())).endswith(b"ok")


async def test_http_1_0_without_a_name_is_for_its_address(rig: Rig) -> None:
    assert b" 404 " in (await rig.raw(b"GET / HTTP/1.0\r\n\r\n")).splitlines()[0]
    assert b" 400 " in (await rig.raw(b"GET / HTTP/1.1\r\n\r\n")).splitlines()[0]


async def test_an_app_of_http_1_0_serves_clients_of_http_1_1(rig: Rig) -> None:
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nold")

    async with app(rig, old), client(rig) as one:
        for _ in range(2):
            await one.say(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
            head = await one.until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert b"transfer-encoding: chunked" in head.lower()
            assert await one.until(b"0\r\n\r\n") == b"3\r\nold\r\n0\r\n\r\n"


# -- Expect: 100-continue ----------------------------------------------------------------------------------------

EXPECT = f"PUT / HTTP/1.1\r\n{HEAD}Content-Length: 5\r\nExpect: 100-continue\r\n\r\n".encode()


async def test_the_body_is_asked_for_when_the_app_asks(rig: Rig) -> None:
    asks, seen = asyncio.Event(), asyncio.Event()

    async def picky(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"expect: 100-continue" in head.lower()
        seen.set()
        await asks.wait()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
        writer.write(PLAIN)
        await reader.read()

    async with app(rig, picky), client(rig) as one:
        await one.say(EXPECT)
        await asyncio.wait_for(seen.wait(), 15)
        first = asyncio.create_task(one.until(b"\r\n\r\n"))
        for _ in range(5):  # the proxy has time for other things, and does not ask
            await rig.raw(b"GET / HTTP/1.0\r\nHost: nobody.test\r\n\r\n")
        assert not first.done()
        asks.set()
        assert await first == b"HTTP/1.1 100 Continue\r\n\r\n"
        await one.say(b"hello")
        assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")


async def test_an_app_that_refuses_by_its_head_alone_is_passed_through(rig: Rig) -> None:
    connections = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
        assert await reader.read() == b"", "not a byte of the body"

    async with app(rig, refuse):
        for _ in range(2):
            said = await rig.raw(EXPECT)
            assert said.startswith(b"HTTP/1.1 413")
            assert said.endswith(b"big")
        assert connections == 2, "what still expects a body takes no other request"


async def test_an_app_that_knows_no_100_gets_the_body_after_a_moment(rig: Rig) -> None:
    async def simple(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
        writer.write(PLAIN)
        await reader.read()

    async with app(rig, simple), client(rig) as one:
        await one.say(EXPECT)
        assert await one.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await one.say(b"hello")
        assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")


# -- early hints -------------------------------------------------------------------------------------------------

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x\r\n\r\n"


async def test_early_hints_come_before_the_answer(rig: Rig) -> None:
    go = asyncio.Event()

    async def hinting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(HINTS)
            await writer.drain()
            await go.wait()
            go.clear()
            writer.write(HINTS + PLAIN)

    async with app(rig, hinting), client(rig) as one:
        for _ in range(2):
            await one.say(f"GET / HTTP/1.1\r\n{HEAD}Accept: text/html\r\n\r\n".encode())
            early = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
            assert await one.until(b"\r\n\r\n") == early, "while the app is still at it"
            go.set()
            assert await one.until(b"\r\n\r\n") == early
            assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            assert await one.exactly(2) == b"ok"


async def test_early_hints_are_for_pages(rig: Rig) -> None:
    async with app(rig, says(HINTS + PLAIN)), client(rig) as one:
        await one.say(f"GET / HTTP/1.1\r\n{HEAD}Accept: application/json\r\n\r\n".encode())
        assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")


# -- streams -----------------------------------------------------------------------------------------------------


async def test_each_event_reaches_the_client_at_once(rig: Rig) -> None:
    more = asyncio.Event()

    async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(3):
            writer.write(b"data: %d\n\n" % number)
            await writer.drain()
            await more.wait()
            more.clear()

    async with app(rig, events, HTTPOptions(compress=True)), client(rig) as one:
        await one.say(f"GET / HTTP/1.1\r\n{HEAD}Accept-Encoding: gzip, br, zstd\r\n\r\n".encode())
        assert b"content-encoding" not in (await one.until(b"\r\n\r\n")).lower()
        for number in range(3):
            assert (await one.until(b"\n\n")).endswith(b"data: %d\n\n" % number)
            more.set()


async def test_a_body_that_breaks_off_is_told_to_the_app_s_log(rig: Rig) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

    async with app(rig, half):
        said = await rig.raw(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert said.endswith(b"half"), "and the connection ends, so that nobody takes it for the whole"
        [line] = await rig.agent.frames_of("ProxyLog")
        assert (line.app, line.machine, line.code) == ("web", "m1", "PU02")


@pytest.mark.parametrize(
    "chunks",
    [b"5\r\nhelloXX", b"zz\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n-1\r\n", b"fffffffffffffffff\r\n"],
    ids=["no end", "no size", "negative", "overflow"],
)
async def test_a_broken_chunk_is_a_bad_request(rig: Rig, chunks: bytes) -> None:
    async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with app(rig, patient):
        said = await rig.raw(f"POST / HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
        assert said.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "fields",
    ["X-Long: " + "x" * 70_000, "\r\n".join(f"X-{n}: 1" for n in range(100))],
    ids=["64 KiB", "100 fields"],
)
async def test_a_head_beyond_its_bounds_is_refused(rig: Rig, fields: str) -> None:
    async with app(rig, says(PLAIN)):
        said = await rig.raw(f"GET / HTTP/1.1\r\n{HEAD}{fields}\r\n\r\n".encode())
        assert said.startswith(b"HTTP/1.1 431")


async def test_a_range_passes_as_it_is(rig: Rig) -> None:
    part = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-4/1000\r\nContent-Type: text/plain\r\n"
    async with app(rig, says(part + b"Content-Length: 5\r\n\r\nhello"), HTTPOptions(compress=True)), client(rig) as one:
        await one.say(f"GET / HTTP/1.1\r\n{HEAD}Range: bytes=0-4\r\nAccept-Encoding: gzip\r\n\r\n".encode())
        head = (await one.until(b"\r\n\r\n")).lower()
        assert b"content-range: bytes 0-4/1000" in head
        assert b"content-encoding" not in head
        assert await one.exactly(5) == b"hello"


# -- time --------------------------------------------------------------------------------------------------------


async def test_an_idle_connection_ends_by_the_app_s_own_limit(rig: Rig) -> None:
    async with app(rig, says(PLAIN, PLAIN), HTTPOptions(idle_timeout=1)), client(rig) as one:
        for _ in range(2):
            await one.say(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
            await one.until(b"\r\n\r\n")
            assert await one.exactly(2) == b"ok"
        assert await one.rest() == b""


async def test_a_head_that_does_not_end_is_not_waited_for(rig: Rig) -> None:
    limits = HTTPOptions(headers_read_timeout=1)
    async with app(rig, says(PLAIN), limits), client(rig) as one:
        await one.say(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
        await one.until(b"\r\n\r\nok")
        await one.say(b"GET / HTTP/1.1\r\nX-Slow: ")
        assert await one.rest() == b""


async def test_a_slow_answer_is_not_an_idle_connection(rig: Rig) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN)
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2.2)  # twice the limit
        writer.write(PLAIN)
        await reader.read()

    async with app(rig, slow, HTTPOptions(idle_timeout=1)), client(rig) as one:
        for _ in range(2):
            await one.say(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
            await one.until(b"\r\n\r\n")
            assert await one.exactly(2) == b"ok"


# -- large bodies ------------------------------------------------------------------------------------------------

MIB = 1 << 20
SIZE = 128 * MIB
GROWTH_MAX = 24 * MIB


def resident(rig: Rig) -> int:
    assert rig.process is not None
    pages = Path(f"/proc/{rig.process.pid}/statm").read_text().split()[1]
    return int(pages) * 4096


async def test_a_large_upload_meets_an_app_that_reads_late(rig: Rig) -> None:
    read = asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await read.wait()
        left = SIZE
        while left:
            left -= len(await reader.read(MIB))
        writer.write(PLAIN)
        await reader.read()

    async with app(rig, late), client(rig) as one:
        before, sent = resident(rig), 0

        async def send() -> None:
            nonlocal sent
            await one.say(f"POST / HTTP/1.1\r\n{HEAD}Content-Length: {SIZE}\r\n\r\n".encode())
            for _ in range(SIZE // MIB):
                await one.say(bytes(MIB))
                sent += MIB

        sending = asyncio.create_task(send())
        await stands_still(lambda: sent)
        assert sent < SIZE // 2
        assert resident(rig) - before < GROWTH_MAX
        read.set()
        await sending
        assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert resident(rig) - before < GROWTH_MAX


async def test_a_large_download_meets_a_client_that_reads_late(rig: Rig) -> None:
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode())
        for _ in range(SIZE // MIB):
            writer.write(bytes(MIB))
            await writer.drain()
            written += MIB
        await reader.read()

    async with app(rig, flood), client(rig) as one:
        before = resident(rig)
        await one.say(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
        await one.until(b"\r\n\r\n")
        await stands_still(lambda: written)
        assert written < SIZE // 2
        assert resident(rig) - before < GROWTH_MAX
        for _ in range(SIZE // MIB):
            await one.exactly(MIB)
        assert resident(rig) - before < GROWTH_MAX


async def stands_still(number: Callable[[], int]) -> None:
    async def settled() -> bool:
        before = number()
        await asyncio.sleep(0.4)
        return number() == before

    await until(settled, bool, within_s=15, every_s=0.01)
