"""The SSH port of a fake agent's machines, when it is a real server's on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import anyio
import anyio.abc

from pantala.errors import NotFound, WrongState
from pantala.wire import node as wire


class _Machine(Protocol):
    id: str
    state: Any


class RelayedStreams:
    def __init__(self, port: int) -> None:
        self._port = port
        self._open: dict[str, anyio.abc.SocketStream] = {}
        self._opened = 0

    async def answer(
        self,
        request: wire.OpenSsh | wire.ReadStream | wire.WriteStream | wire.CloseStream,
        find: Callable[[str], _Machine],
    ) -> Any:
        if isinstance(request, wire.OpenSsh):
            machine = find(request.machine_id)
            if machine.state != "started":
                raise WrongState(f"machine is {machine.state}, not started")
            self._opened += 1
            stream_id = f"{machine.id}-{self._opened}"
            self._open[stream_id] = await anyio.connect_tcp("127.0.0.1", self._port)
            return wire.OpenedStream(stream_id=stream_id)
        stream = self._open.get(request.stream_id)
        if stream is None:
            raise NotFound("there is no such stream")
        match request:
            case wire.CloseStream():
                del self._open[request.stream_id]
                await anyio.aclose_forcefully(stream)
            case wire.WriteStream():
                await stream.send(request.data)
            case wire.ReadStream():
                with anyio.move_on_after(request.wait_s):
                    try:
                        return wire.StreamData(data=await stream.receive())
                    except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                        return wire.StreamData(data=b"", ended=True)
                return wire.StreamData(data=b"")
        return None
