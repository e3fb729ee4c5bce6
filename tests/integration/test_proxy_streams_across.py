"""Streams of HTTP/2 that the edge opens itself: to another host's proxy, and to an app with `h2_backend`. What comes
ahead of an answer comes through, clients that leave are heard of at the other end, goodbyes lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from h2.errors import ErrorCodes
from h2.events import InformationalResponseReceived, ResponseReceived, StreamReset
from http2_rig import Speaker, connected, speaker, text
from mesh_rig import HOST, Cluster, Host, cluster, talk
from proxy_rig import WITHIN_S, row

from pantala.testing.authority import Authority
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import Load
from pantala.wire.machine import HTTPOptions, Port

pytestmark = pytest.mark.anyio
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PAGE = ("accept", "text/html")
HINT = "</%d.css>; rel=preload"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def ca() -> Authority:
    return Authority()


@pytest.fixture
async def pair(tmp_path: Path, ca: Authority) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr") as made:
        await made.rows(row("certs", "cert/web", ca.issue(HOST)))
        yield made


class Road:
    """Where the app is, seen from the edge, and what it speaks."""

    def __init__(self, *, abroad: bool, h2: bool) -> None:
        self.abroad, self.h2 = abroad, h2

    def home(self, pair: Cluster) -> Host:
        return pair.hosts[self.abroad]

    @contextlib.asynccontextmanager
    async def app(self, pair: Cluster, by_http_1: Talk, by_http_2: Talk) -> AsyncGenerator[None]:
        serve = by_http_2 if self.h2 else by_http_1

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)
            writer.close()

        port, home = free_port(), self.home(pair)
        options = HTTPOptions(h2_backend=self.h2)
        ports = [
            Port(port=pair.ports.http, handlers=["http"], http_options=options),
            Port(port=pair.ports.https, handlers=["tls", "http"], http_options=options),
        ]
        async with await asyncio.start_server(converse, home.machines, port):
            await pair.web(port, pair.machine(home, "m1"), ports=ports)
            yield


ROADS = {
    "here by HTTP/2": Road(abroad=False, h2=True),
    "abroad": Road(abroad=True, h2=False),
    "abroad by HTTP/2": Road(abroad=True, h2=True),
}
roads = pytest.mark.parametrize("road", list(ROADS.values()), ids=list(ROADS))


# -- ahead of the answer -----------------------------------------------------------------------------------------


@roads
async def test_early_hints_come_before_the_answer(pair: Cluster, ca: Authority, road: Road) -> None:
    go = asyncio.Event()

    async def by_http_1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = "HTTP/1.1 103 Early Hints\r\nLink: %s\r\nConnection: x\r\nX: y\r\n\r\n"
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write((said % (HINT % 1)).encode())
            await go.wait()
            go.clear()
            writer.write("".join(said % (HINT % number) for number in (2, 3)).encode() + PLAIN)

    async def by_http_2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with speaker(reader, writer, client=False) as app:
            async for stream in app.requests():
                app.begin(stream, ("link", HINT % 1), status="103")
                await go.wait()
                go.clear()
                for number in (2, 3):
                    app.begin(stream, ("link", HINT % number), status="103")
                app.begin(stream, ("content-length", "2"))
                app.say(stream, b"ok", end=True)

    here = pair.hosts[0]
    async with road.app(pair, by_http_1, by_http_2):
        async with connected(here.rig, ca) as one:
            for _ in range(2):
                stream = one.ask(PAGE)
                first = await anext(one.events(stream))
                assert isinstance(first, InformationalResponseReceived), "while the app is still at it"
                go.set()
                *early, head, data, _ = await one.all(stream)
                hints = [text(hint.headers)["link"] for hint in early]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
                assert hints == [HINT % 1, HINT % 2, HINT % 3]
                assert isinstance(head, ResponseReceived)
                assert data.data == b"ok"  # pyright: ignore[reportAttributeAccessIssue]
        async with talk(here.address, pair.ports.http) as one:
            await one.say(f"GET / HTTP/1.1\r\nHost: {HOST}\r\nAccept: text/html\r\n\r\n".encode())
            early = [f"HTTP/1.1 103 Early Hints\r\nlink: {HINT % number}\r\n\r\n".encode() for number in (1, 2, 3)]
            assert await one.until(b"\r\n\r\n") == early[0], "while the app is still at it"
            go.set()
            assert [await one.until(b"\r\n\r\n") for _ in range(2)] == early[1:]
            assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            assert await one.exactly(2) == b"ok"


@roads
async def test_a_body_is_asked_for_when_the_app_asks(pair: Cluster, road: Road) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def by_http_1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"expect: 100-continue" in (await reader.readuntil(b"\r\n\r\n")).lower()
        asked.set()
        await go.wait()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
        writer.write(PLAIN)
        await reader.read()

    async def by_http_2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with speaker(reader, writer, client=False) as app:
            async for stream in app.requests():
                asked.set()
                await go.wait()
                app.begin(stream, status="100")
                assert await app.data(stream, 5) == b"hello"
                app.begin(stream, ("content-length", "2"))
                app.say(stream, b"ok", end=True)

    here = pair.hosts[0]
    async with road.app(pair, by_http_1, by_http_2), talk(here.address, pair.ports.http) as one:
        head = f"PUT / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        await one.say(head.encode())
        await asyncio.wait_for(asked.wait(), WITHIN_S)
        first = asyncio.create_task(one.until(b"\r\n\r\n"))
        for _ in range(5):  # the proxy has time for other things, and does not ask
            await here.rig.raw(b"GET / HTTP/1.0\r\nHost: nobody.test\r\n\r\n")
        assert not first.done()
        go.set()
        assert await first == b"HTTP/1.1 100 Continue\r\n\r\n"
        await one.say(b"hello")
        assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")


# -- clients that leave --------------------------------------------------------------------------------------------


@roads
async def test_a_client_that_leaves_is_heard_of_by_the_app(pair: Cluster, ca: Authority, road: Road) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()
    begins = False

    async def by_http_1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if begins:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        asked.set()
        with contextlib.suppress(ConnectionError):
            while await reader.read(1024):
                pass
        gone.set()

    async def by_http_2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with speaker(reader, writer, client=False) as app:
            async for stream in app.requests():
                if begins:
                    app.begin(stream, ("content-length", "100"))
                asked.set()
                async for event in app.events(stream):
                    if isinstance(event, StreamReset):
                        gone.set()
                        break

    async def left() -> None:
        await asyncio.wait_for(gone.wait(), WITHIN_S)
        await in_flight(road.home(pair), 0)
        asked.clear()
        gone.clear()

    here = pair.hosts[0]
    async with road.app(pair, by_http_1, by_http_2), connected(here.rig, ca) as one:
        for begins in (False, True):
            for method in ("GET", "POST"):  # a body that has not ended
                stream = one.ask(method=method)
                await asyncio.wait_for(asked.wait(), WITHIN_S)
                if begins:
                    await one.head(stream)
                one.h2.reset_stream(stream, ErrorCodes.CANCEL)
                one.flush()
                await left()
            async with talk(here.address, pair.ports.http) as other:
                await other.say(f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 5\r\n\r\nhel".encode())
                await asyncio.wait_for(asked.wait(), WITHIN_S)
            await left()


async def in_flight(host: Host, number: int) -> None:
    async def told() -> int:
        loads = [frame for frame in host.rig.agent.frames if isinstance(frame, Load)]
        return sum(load.in_flight for load in loads[-1].machines) if loads else 0

    await until(told, lambda now: now == number, within_s=WITHIN_S, every_s=0.01)


# -- goodbyes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_goodbye_of_an_app_loses_nothing(pair: Cluster, ca: Authority, method: str) -> None:
    connections: list[Speaker] = []

    async def leaving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with speaker(reader, writer, client=False) as app:
            connections.append(app)
            async for stream in app.requests():
                if len(connections) > 1:
                    app.begin(stream)
                    app.say(stream, b"second", end=True)
                elif stream == 1:
                    app.begin(stream)
                    app.say(stream, b"first ")
                else:
                    app.leave(1)

    road = ROADS["abroad by HTTP/2"]
    async with road.app(pair, leaving, leaving), connected(pair.hosts[0].rig, ca) as one:
        first = one.ask()
        assert await one.data(first, 6) == b"first "
        second = one.ask(method=method)
        if method == "POST":
            one.say(second, b"once", end=True)
        head, body, _ = await one.answer(second)
        assert (head[":status"], body) == ("200", b"second"), "it was not looked at, so it is asked again"
        connections[0].say(1, b"last", end=True)
        assert await one.data(first, 4) == b"last", "what was begun goes on"
        await one.end(first)
        assert len(connections) == 2


async def test_a_host_that_leaves_ends_what_is_under_way(pair: Cluster) -> None:
    half, go = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        half.set()
        await go.wait()
        writer.write(b"rest")

    here, there = pair.hosts
    async with ROADS["abroad"].app(pair, slow, slow), talk(here.address, pair.ports.http) as one:
        await one.say(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        assert (await one.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await one.exactly(4) == b"half"
        assert there.rig.process is not None
        there.rig.process.send_signal(signal.SIGTERM)
        await until(here.peers, lambda peers: peers["n2"]["state"] == "down", within_s=WITHIN_S, every_s=0.01)
        go.set()
        assert await one.exactly(4) == b"rest"
        assert await there.rig.stop() == 0
