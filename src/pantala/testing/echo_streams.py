"""The SSH port of a fake agent's machines: it says what it hears, and ends after the word `bye`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import anyio

from pantala.errors import NotFound, WrongState
from pantala.wire import node as wire


class _Machine(Protocol):
    id: str
    state: Any


class EchoStreams:
    def __init__(self) -> None:
        self._heard: dict[str, bytes] = {}

    async def answer(
        self,
        request: wire.OpenSsh | wire.ReadStream | wire.WriteStream | wire.CloseStream,
        find: Callable[[str], _Machine],
    ) -> Any:
        if isinstance(request, wire.OpenSsh):
            machine = find(request.machine_id)
            if machine.state != "started":
                raise WrongState(f"machine is {machine.state}, not started")
            self._heard[machine.id] = b""
            return wire.OpenedStream(stream_id=machine.id)
        if request.stream_id not in self._heard:
            raise NotFound("there is no such stream")
        match request:
            case wire.CloseStream():
                del self._heard[request.stream_id]
                return None
            case wire.WriteStream():
                self._heard[request.stream_id] += request.data
                return None
            case wire.ReadStream():
                data, self._heard[request.stream_id] = self._heard[request.stream_id], b""
                if not data:
                    await anyio.sleep(0.01)
                return wire.StreamData(data=data.removesuffix(b"bye"), ended=data.endswith(b"bye"))
