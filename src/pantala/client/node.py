"""Typed client of the node API: one request to the agent that owns a machine, over the bus.

A mutation carries a `request_id`, so it may be sent again until it is answered: the agent repeats the answer, not the
work. `encode_error` and `decode_error` are the two ends of how an error crosses the bus.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec

from pantala import errors
from pantala.errors import InternalError, NodeUnreachable, PantalaError, RateLimited
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, SystemClock
from pantala.wire import node as wire
from pantala.wire.node import NodeError, NodeRequest

CALL_TIMEOUT_S = 10.0
ATTEMPTS_MAX = 3
RETRY_AFTER_S = 0.1
SILENT_RETRY_S = 5.0
"""When to ask again for what a silent host has: it may be back by then."""
AT_ONCE_MAX, IN_LINE_MAX, IN_LINE_S = 16, 32, 1.0
"""Calls that one node works on, and those in line behind them: a slow node holds up those who ask it, nobody else."""
WAITS_AT_ONCE_MAX = 128
"""Calls that wait for something to happen there. With the others fewer than a node takes (`kit/bus.py`)."""

_WAITS = (wire.WaitMachine, wire.ExecMachine, wire.ReadLogs, wire.RunEscapeSuite)


class _Reply(msgspec.Struct, frozen=True):
    """`NodeReply` as it comes: the request decides what the result is read as, and it is read once."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: NodeError | None = None


_REPLY = msgspec.json.Decoder(_Reply)


def subject(node: str) -> str:
    return f"pantala.node.{node}.call"


class _Line:
    """Who talks to one node. Nobody waits long: refused at once when many are in line, else after `IN_LINE_S`."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._limiter = anyio.CapacityLimiter(AT_ONCE_MAX)
        self._waits = 0

    @asynccontextmanager
    async def turn(self, *, waits: bool) -> AsyncGenerator[None]:
        """Raises RateLimited, also when the node might have answered a moment later; nothing was sent then."""
        if waits:
            if self._waits >= WAITS_AT_ONCE_MAX:
                raise self._busy()
            self._waits += 1
            try:
                yield
            finally:
                self._waits -= 1
            return
        turn = object()
        if self._limiter.available_tokens > 0:
            self._limiter.acquire_on_behalf_of_nowait(turn)
        else:
            if self._limiter.statistics().tasks_waiting >= IN_LINE_MAX:
                raise self._busy()
            with anyio.move_on_after(IN_LINE_S) as scope:
                await self._limiter.acquire_on_behalf_of(turn)
            if scope.cancelled_caught:
                raise self._busy()
        try:
            yield
        finally:
            self._limiter.release_on_behalf_of(turn)

    @property
    def is_idle(self) -> bool:
        return not self._waits and not self._limiter.borrowed_tokens and not self._limiter.statistics().tasks_waiting

    def _busy(self) -> RateLimited:
        return RateLimited(f"the host {self._node} is busy with other requests; nothing was done", retry_after_s=1.0)


class NodeClient:
    def __init__(self, bus: Bus, clock: Clock | None = None) -> None:
        self._bus = bus
        self._clock = clock or SystemClock()
        self._lines: dict[str, _Line] = {}

    async def call(
        self, node: str, request: NodeRequest, *, timeout_s: float = CALL_TIMEOUT_S, once: bool = False
    ) -> Any:
        """The result, of the type that `wire.node.RESULTS` gives. Raises what the agent raised, NodeUnreachable, or
        RateLimited when too many others ask the same node. A mutation is sent `ATTEMPTS_MAX` times within `timeout_s`
        (`once`: it is not): a message may be lost together with a connection.

        NodeUnreachable after a mutation means *not known*: it may have been done.
        """
        line = self._lines.setdefault(node, _Line(node))
        try:
            async with line.turn(waits=isinstance(request, _WAITS)):
                return await self._call(node, request, timeout_s, once=once)
        finally:
            if line.is_idle and self._lines.get(node) is line:
                del self._lines[node]

    async def _call(self, node: str, request: NodeRequest, timeout_s: float, *, once: bool) -> Any:
        payload = msgspec.json.encode(request)
        attempts = ATTEMPTS_MAX if isinstance(request, wire.MUTATIONS) and not once else 1
        # What waits there for something to happen is not sent again while it waits.
        patience_s = timeout_s if isinstance(request, _WAITS) else timeout_s / attempts
        for attempt in range(1, attempts + 1):
            begun = self._clock.monotonic()
            try:
                answer = await self._bus.request(subject(node), payload, timeout_s=patience_s)
                return decode_reply(request, answer)
            except NodeUnreachable as error:
                waited = isinstance(request, _WAITS) and self._clock.monotonic() - begun >= patience_s
                if attempt == attempts or waited:
                    raise NodeUnreachable(f"the host {node} does not answer", retry_after_s=SILENT_RETRY_S) from error
                await self._clock.sleep(RETRY_AFTER_S)
        raise AssertionError("the loop above returns or raises")


def decode_reply(request: NodeRequest, payload: bytes) -> Any:
    try:
        reply = _REPLY.decode(payload)
        if reply.error is None:
            kind = wire.RESULTS[type(request)]
            return None if kind is None else msgspec.json.decode(reply.result, type=kind)
    except msgspec.MsgspecError as error:
        raise InternalError(f"the answer to {type(request).__name__} cannot be read: {error}") from error
    raise decode_error(reply.error)


def encode_error(error: PantalaError) -> NodeError:
    return NodeError(
        kind=type(error).__name__,
        message=error.message,
        http_code=error.http_code,
        status=error.status,
        hint=error.hint,
        retry_after_s=getattr(error, "retry_after_s", None),
    )


def decode_error(error: NodeError) -> PantalaError:
    """The same class that the agent raised; a class that this version does not know becomes its nearest parent."""
    kind = getattr(errors, error.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, PantalaError)):
        kind = errors.UserError if error.http_code < 500 else errors.InternalError
    if issubclass(kind, errors.RateLimited):
        return kind(error.message, retry_after_s=error.retry_after_s or 1.0, hint=error.hint)
    if issubclass(kind, errors.TransientError):
        return kind(error.message, retry_after_s=error.retry_after_s or 1.0, hint=error.hint)
    if issubclass(kind, errors.InvalidRequest | errors.CapacityError):
        return kind(error.message, hint=error.hint)
    if issubclass(kind, errors.DriverError | errors.InternalError):
        return kind(error.message)
    return kind(error.message, hint=error.hint, status=error.status)
