"""`/.fly/api` of a machine: the Machines API without a token, limited to the machine that asks.

It is answered by the owner of its truth, so it works while the control plane is away.

    process ──/.fly/api──► init ──the connection itself──► agent: `GuestApi.serve` ──► node API

Who asks is certain: a connection comes through the init of one machine.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.abc
import h11
import msgspec
import structlog

from pantala.domain import signals
from pantala.domain.durations import seconds
from pantala.errors import InvalidRequest, NotFound, NotOffered, PantalaError
from pantala.journal import MachineRecord
from pantala.kit.ids import ulid
from pantala.wire import node
from pantala.wire.api import ErrorBody, HoldRequest, MetadataValue, SignalRequest, StopRequest

log = structlog.get_logger()

CALLS_AT_ONCE_MAX = 8
BODY_BYTES_MAX = 64 * 1024
HEAD_BYTES_MAX = 16 * 1024
SILENCE_S = 30.0
"""A connection that says nothing for so long ends."""

T = TypeVar("T")
NodeCall = Callable[[bytes], Awaitable[bytes]]
Hold = Callable[[str, float, str], Awaitable[MachineRecord]]
_encode = msgspec.json.encode


class Asked(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes


class GuestApi:
    """`call` is the node API, as control calls it; `hold` keeps a machine from being put to sleep."""

    def __init__(self, call: NodeCall, hold: Hold) -> None:
        self._call = call
        self._hold = hold

    async def serve(self, record: MachineRecord, calls: AsyncGenerator[socket.socket]) -> None:
        """Answer the calls of one machine while it runs; those beyond the bound wait in its init."""
        places = anyio.Semaphore(CALLS_AT_ONCE_MAX)
        async with aclosing(calls), anyio.create_task_group() as tasks:
            async for connection in calls:
                await places.acquire()
                tasks.start_soon(self._converse, record, connection, places)

    async def _converse(self, record: MachineRecord, connection: socket.socket, places: anyio.Semaphore) -> None:
        try:
            async with await anyio.abc.UNIXSocketStream.from_socket(connection) as stream:
                await _Conversation(stream, lambda asked: self.answer(record, asked)).run()
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream, h11.ProtocolError, TimeoutError) as error:
            log.debug("call of a machine ended early", machine=record.id, error=str(error))
        finally:
            places.release()

    # -- what may be asked ---------------------------------------------------------------------------------------------

    async def answer(self, record: MachineRecord, asked: Asked) -> tuple[int, bytes]:
        """Status and JSON body."""
        try:
            reply = await self._ask(record, asked)
        except PantalaError as error:
            return error.http_code, _encode(ErrorBody(error=error.sentence(), status=error.status))
        if reply.error is not None:
            return reply.error.http_code, _encode(ErrorBody(error=reply.error.message, status=reply.error.status))
        return 200, _encode({} if reply.result is None else reply.result)

    async def _ask(self, record: MachineRecord, asked: Asked) -> node.NodeReply:
        if asked.path.startswith("/v1/tokens/"):
            raise NotOffered("tokens for machines are not offered by this version of Pantala")
        own = f"/v1/apps/{record.app.name}/machines/{record.id}"
        if asked.path != own and not asked.path.startswith(f"{own}/"):
            raise NotFound(f"this socket serves its own machine only: {own}")
        if asked.path == f"{own}/hold":
            return await self._hold_awake(record, asked)
        request = _request(record.id, asked, asked.path.removeprefix(own).strip("/"))
        return msgspec.json.decode(await self._call(_encode(request)), type=node.NodeReply)

    async def _hold_awake(self, record: MachineRecord, asked: Asked) -> node.NodeReply:
        """`POST` for so many seconds, `DELETE` not any longer."""
        if asked.method not in ("POST", "DELETE"):
            raise NotFound(f"{asked.method} {asked.path} is not served inside a machine")
        wanted = _body(asked, HoldRequest) if asked.method == "POST" else HoldRequest(seconds=0)
        await self._hold(record.id, wanted.seconds, wanted.reason)
        return node.NodeReply()


def _request(machine_id: str, asked: Asked, what: str) -> node.NodeRequest:
    """The node call that a request means. Raises NotFound and InvalidRequest."""
    request_id = f"self-{ulid()}"
    key = what.removeprefix("metadata/")
    match asked.method, what:
        case "GET", "":
            return node.GetMachine(machine_id=machine_id)
        case "GET", "events":
            return node.ListEvents(machine_id=machine_id)
        case "GET", "ps":
            return node.ListProcesses(machine_id=machine_id)
        case "POST", "suspend":
            return node.SuspendMachine(request_id=request_id, machine_id=machine_id)
        case "POST", "stop":
            wanted = _body(asked, StopRequest)
            timeout_s = seconds(wanted.timeout, field="timeout", default=0.0) or None
            return node.StopMachine(
                request_id=request_id, machine_id=machine_id, signal=wanted.signal, timeout_s=timeout_s
            )
        case "POST", "restart":
            return node.RestartMachine(request_id=request_id, machine_id=machine_id)
        case "POST", "signal":
            number = signals.number(str(_body(asked, SignalRequest).signal), field="signal")
            return node.SignalMachine(request_id=request_id, machine_id=machine_id, signal=number)
        case "POST", _ if key != what:
            value = _body(asked, MetadataValue).value
            return node.SetMetadata(request_id=request_id, machine_id=machine_id, key=key, value=value)
        case "DELETE", _ if key != what:
            return node.SetMetadata(request_id=request_id, machine_id=machine_id, key=key, value=None)
        case _:
            raise NotFound(f"{asked.method} {asked.path} is not served inside a machine")


def _body(asked: Asked, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(asked.body or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body cannot be read: {error}") from error


class _Conversation:
    """HTTP/1.1 over one connection: requests one after the other, bounded in size and silence."""

    def __init__(self, stream: anyio.abc.ByteStream, answer: Callable[[Asked], Awaitable[tuple[int, bytes]]]) -> None:
        self._stream = stream
        self._answer = answer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def run(self) -> None:
        while True:
            asked = await self._next()
            if asked is None:
                return
            await self._send(*await self._answer(asked))
            if self._http.our_state is h11.MUST_CLOSE:
                return
            self._http.start_next_cycle()

    async def _next(self) -> Asked | None:
        head, body = None, bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._stream.send(
                        self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                    )
                with anyio.fail_after(SILENCE_S):
                    self._http.receive_data(await self._receive())
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > BODY_BYTES_MAX:
                    await self._send(413, _encode(ErrorBody(error=f"a body has at most {BODY_BYTES_MAX} bytes")))
                    return None
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                parts = urlsplit(head.target.decode("ascii", "replace"))
                return Asked(head.method.decode(), parts.path, parse_qs(parts.query), bytes(body))
            else:
                return None  # closed

    async def _receive(self) -> bytes:
        try:
            return await self._stream.receive()
        except anyio.EndOfStream:
            return b""

    async def _send(self, status: int, body: bytes) -> None:
        headers: list[tuple[str, Any]] = [("content-type", "application/json"), ("content-length", str(len(body)))]
        said = self._http.send(h11.Response(status_code=status, headers=headers)) or b""
        said += self._http.send(h11.Data(data=body)) or b""
        said += self._http.send(h11.EndOfMessage()) or b""
        with anyio.fail_after(SILENCE_S):
            await self._stream.send(said)
