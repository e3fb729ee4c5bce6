"""A speaker of HTTP/2 that tests can steer stream by stream: a client of the edge, or an app."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.settings import SettingCodes
from mesh_rig import HOST
from proxy_rig import WITHIN_S, Rig

from pantala.testing.authority import Authority

PREFACE_BYTES = 24
HEAD_BYTES = 9
GOAWAY = 7


class Speaker:
    """One end of one connection. A GOAWAY is kept from h2, which would take the connection for closed: `goaways` are
    the reasons. `takes`: what came makes room for more at once."""

    def __init__(self, writer: asyncio.StreamWriter, h2: H2Connection) -> None:
        self.goaways: list[int] = []
        self.takes = True
        self.h2, self._writer = h2, writer
        self._events: list[Event] = []
        self._came = asyncio.Event()
        self._taken = 0
        self._over = False
        self._later: list[asyncio.Task[None]] = []

    async def run(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if not self.h2.config.client_side:
                self.h2.receive_data(await reader.readexactly(PREFACE_BYTES))
            while True:
                head = await reader.readexactly(HEAD_BYTES)
                rest = await reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] == GOAWAY:
                    self.goaways.append(int.from_bytes(rest[4:8], "big"))
                else:
                    self._hear(head + rest)
                self._came.set()
        self._over = True
        self._came.set()

    def _hear(self, frame: bytes) -> None:
        for event in self.h2.receive_data(frame):
            if isinstance(event, DataReceived) and self.takes:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            self._events.append(event)
        self.flush()

    def close(self) -> None:
        self._writer.close()

    async def over(self) -> bool:
        """The other end closed the connection."""
        return self._over

    async def heard(self) -> list[Event]:
        return self._events

    def raw(self, frames: bytes) -> None:
        """As they are, past h2."""
        self._writer.write(frames)

    async def left(self) -> list[int]:
        return self.goaways

    async def room(self, stream: int) -> int:
        """How much the other end takes now."""
        return self.h2.local_flow_control_window(stream)

    def flush(self) -> None:
        self._writer.write(self.h2.data_to_send())

    async def events(self, stream: int) -> AsyncIterator[Event]:
        """From the first one on."""
        at = 0
        while True:
            while at < len(self._events):
                event = self._events[at]
                at += 1
                if getattr(event, "stream_id", None) == stream and not isinstance(event, WindowUpdated):
                    yield event
            self._came.clear()
            await asyncio.wait_for(self._came.wait(), WITHIN_S)

    def ask(self, *fields: tuple[str, str], method: str = "GET", path: str | None = "/") -> int:
        stream = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":authority", HOST)]
        pseudo += [(":scheme", "https"), (":path", path)] if path else []
        pseudo += [field for field in fields if field[0].startswith(":")]
        rest = [field for field in fields if not field[0].startswith(":")]
        self.h2.send_headers(stream, pseudo + rest, end_stream=method in ("GET", "HEAD"))
        self.flush()
        return stream

    def say(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    async def head(self, stream: int) -> dict[str, str]:
        async for event in self.events(stream):
            if isinstance(event, ResponseReceived):
                return text(event.headers)
            assert isinstance(event, InformationalResponseReceived), event
        raise AssertionError

    async def data(self, stream: int, size: int) -> bytes:
        """The next ones; nobody else may read this stream meanwhile."""
        got = b""
        async for event in self.events(stream):
            if isinstance(event, DataReceived):
                got += event.data
            if len(got) >= self._taken + size:
                self._taken += size
                return got[self._taken - size : self._taken]
        raise AssertionError

    async def end(self, stream: int) -> None:
        async for event in self.events(stream):
            if isinstance(event, StreamEnded):
                return

    async def all(self, stream: int) -> list[Event]:
        """Until it is ended or reset."""
        heard: list[Event] = []
        async for event in self.events(stream):
            heard.append(event)
            if isinstance(event, StreamEnded | StreamReset):
                break
        return heard

    async def answer(self, stream: int) -> tuple[dict[str, str], bytes, dict[str, str]]:
        head: dict[str, str] = {}
        body, trailers = b"", dict[str, str]()
        async for event in self.events(stream):
            if isinstance(event, ResponseReceived):
                head = text(event.headers)
            elif isinstance(event, DataReceived):
                body += event.data
            elif isinstance(event, StreamEnded):
                break
            else:
                trailers = text(getattr(event, "headers", None) or [])
        return head, body, trailers

    # -- as an app

    async def requests(self) -> AsyncIterator[int]:
        at = 0
        while not self._over:
            while at < len(self._events):
                event = self._events[at]
                at += 1
                if type(event).__name__ == "RequestReceived":
                    yield event.stream_id  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
            self._came.clear()
            await self._came.wait()

    def begin(self, stream: int, *fields: tuple[str, str], status: str = "200") -> None:
        """The head of an answer, or what comes ahead of it."""
        self.h2.send_headers(stream, [(":status", status), *fields])
        self.flush()

    def leave(self, last: int) -> None:
        """A goodbye in good order: nothing after the stream `last` was looked at. h2 itself would end the rest too."""
        self._writer.write(bytes([0, 0, 8, GOAWAY, 0, 0, 0, 0, 0]) + last.to_bytes(4, "big") + bytes(4))

    def answer_later(self, stream: int, gate: asyncio.Event) -> None:
        async def answer() -> None:
            await gate.wait()
            self.begin(stream)
            self.say(stream, b"ok", end=True)

        self._later.append(asyncio.create_task(answer()))


def text(fields: Any) -> dict[str, str]:
    def plain(part: bytes | str) -> str:
        return part.decode() if isinstance(part, bytes) else part

    return {plain(name): plain(value) for name, value in fields}


@contextlib.asynccontextmanager
async def speaker(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    client: bool,
    streams_max: int = 100,
    strict: bool = True,
) -> AsyncGenerator[Speaker]:
    """Not `strict`: what comes may have an `Host` beside another authority, as between proxies."""
    config = H2Configuration(client_side=client, header_encoding=None, validate_outbound_headers=False)
    config.validate_inbound_headers = strict
    h2 = H2Connection(config)
    h2.initiate_connection()
    h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: streams_max})
    made = Speaker(writer, h2)
    made.flush()
    running = asyncio.create_task(made.run(reader))
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # what was still under way comes after our goodbye
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def connected(rig: Rig, ca: Authority | None = None) -> AsyncGenerator[Speaker]:
    """A client of the edge, once its settings came."""
    context = (ca or rig.ca).context()
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(rig.address, rig.ports.https, ssl=context, server_hostname=HOST)
    async with speaker(reader, writer, client=True) as made:
        async with asyncio.timeout(WITHIN_S):
            while made.h2.remote_settings.enable_connect_protocol != 1:
                await asyncio.sleep(0.01)
        yield made
