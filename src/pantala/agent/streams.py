"""Connections into machines that control carries for its users (`wire/node.py`: `OpenSsh` and what follows it).

A stream is a TCP connection to the machine's SSH port. Nothing is read ahead of control's next call, so a slow client
slows the machine down and nothing piles up here. Whoever forgets a stream loses it.
"""

from __future__ import annotations

from typing import Any

import anyio
import anyio.abc
import structlog

from pantala.agent.host import Host
from pantala.agent.ssh import PORT
from pantala.domain.machine import State
from pantala.errors import InternalError, InvalidRequest, NotFound, RateLimited, WrongState
from pantala.kit import ids
from pantala.wire import node

log = structlog.get_logger()

STREAMS_MAX = 64
CONNECT_S = 5.0
READ_WAIT_S_MAX = 30.0
WRITE_S_MAX = 8.0
FORGOTTEN_S = 60.0
LOOK_EVERY_S = 10.0


class _Stream:
    def __init__(self, socket: anyio.abc.SocketStream) -> None:
        self.socket = socket
        self.used_at = anyio.current_time()
        self.reads = anyio.Lock()
        self.writes = anyio.Lock()


class Streams:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._open: dict[str, _Stream] = {}
        self._opening = 0

    async def run(self) -> None:
        """Closes what nobody reads any more, until cancelled; then all."""
        try:
            while True:
                await anyio.sleep(LOOK_EVERY_S)
                before = anyio.current_time() - FORGOTTEN_S
                for stream_id in [key for key, stream in self._open.items() if stream.used_at < before]:
                    await self._close(stream_id)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                for stream_id in list(self._open):
                    await self._close(stream_id)

    async def answer(self, request: Any) -> object:
        match request:
            case node.OpenSsh():
                return await self._connect(request.machine_id)
            case node.ReadStream():
                return await self._read(request)
            case node.WriteStream():
                return await self._write(request)
            case node.CloseStream():
                return await self._close(request.stream_id)
            case _:
                raise InternalError(f"nobody carries {type(request).__name__}")

    async def _connect(self, machine_id: str) -> node.OpenedStream:
        record = self._host.get(machine_id).record
        if record.state is not State.STARTED:
            raise WrongState(f"machine is {record.state}, not started")
        if len(self._open) + self._opening >= STREAMS_MAX:
            raise RateLimited(f"{STREAMS_MAX} sessions are open on this host already", retry_after_s=10.0)
        self._opening += 1
        try:
            with anyio.fail_after(CONNECT_S):
                socket = await anyio.connect_tcp(record.ip6, PORT)
        except (OSError, TimeoutError) as error:
            raise WrongState(
                f"machine {machine_id} does not answer on its SSH port",
                hint="it was started before this platform knew SSH, or its app has taken port 22: its log says which",
            ) from error
        finally:
            self._opening -= 1
        stream_id = ids.token("stream")
        self._open[stream_id] = _Stream(socket)
        return node.OpenedStream(stream_id=stream_id)

    async def _read(self, request: node.ReadStream) -> node.StreamData:
        stream = self._find(request.stream_id)
        async with stream.reads:
            stream.used_at = anyio.current_time()
            with anyio.move_on_after(min(max(request.wait_s, 0.0), READ_WAIT_S_MAX)):
                try:
                    return node.StreamData(data=await stream.socket.receive(node.STREAM_BYTES_MAX))
                except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return node.StreamData(data=b"", ended=True)
            stream.used_at = anyio.current_time()
            return node.StreamData(data=b"")

    async def _write(self, request: node.WriteStream) -> None:
        if len(request.data) > node.STREAM_BYTES_MAX:
            raise InvalidRequest(f"may have {node.STREAM_BYTES_MAX} bytes", field="data")
        stream = self._find(request.stream_id)
        async with stream.writes:
            try:
                with anyio.fail_after(WRITE_S_MAX):
                    if request.data:
                        await stream.socket.send(request.data)
                    if request.last:
                        await stream.socket.send_eof()
            except (OSError, TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                await self._close(request.stream_id)
                raise NotFound("the connection to the machine is gone") from error

    async def _close(self, stream_id: str) -> None:
        stream = self._open.pop(stream_id, None)
        if stream is not None:
            await anyio.aclose_forcefully(stream.socket)

    def _find(self, stream_id: str) -> _Stream:
        stream = self._open.get(stream_id)
        if stream is None:
            raise NotFound("there is no such stream")
        return stream
