"""Typed client of the node API: one request to the agent that owns a machine, over the bus.

A mutation carries a `request_id`, so it may be sent again until it is answered: the agent repeats the answer, not the
work. `encode_error` and `decode_error` are the two ends of how an error crosses the bus.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pantala import errors
from pantala.errors import InternalError, NodeUnreachable, PantalaError
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, SystemClock
from pantala.wire import node as wire
from pantala.wire.node import NodeError, NodeReply, NodeRequest

CALL_TIMEOUT_S = 10.0
ATTEMPTS_MAX = 3
RETRY_AFTER_S = 0.1

_REPLY = msgspec.json.Decoder(NodeReply)


def subject(node: str) -> str:
    return f"pantala.node.{node}.call"


class NodeClient:
    def __init__(self, bus: Bus, clock: Clock | None = None) -> None:
        self._bus = bus
        self._clock = clock or SystemClock()

    async def call(self, node: str, request: NodeRequest, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The result, of the type that `wire.node.RESULTS` gives. Raises what the agent raised, or NodeUnreachable.

        NodeUnreachable after a mutation means *not known*: it may have been done.
        """
        payload = msgspec.json.encode(request)
        attempts = ATTEMPTS_MAX if isinstance(request, wire.MUTATIONS) else 1
        for attempt in range(1, attempts + 1):
            try:
                answer = await self._bus.request(subject(node), payload, timeout_s=timeout_s)
                return decode_reply(request, answer)
            except NodeUnreachable as error:
                if attempt == attempts:
                    raise NodeUnreachable(f"the host {node} does not answer") from error
                await self._clock.sleep(RETRY_AFTER_S)
        raise AssertionError("the loop above returns or raises")


def decode_reply(request: NodeRequest, payload: bytes) -> Any:
    try:
        reply = _REPLY.decode(payload)
        if reply.error is None:
            kind = wire.RESULTS[type(request)]
            return None if kind is None else msgspec.convert(reply.result, type=kind)
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
