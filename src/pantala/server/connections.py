"""One client's connection, bounded: how long the head of a request may take, how long nothing of an answer is read, how
many connections there are. Whatever a client does or leaves undone, what it holds is given back.

uvicorn's protocol, which bounds only how long a connection may be idle between two requests (`http.py` composes it).
Bodies are bounded where a request gets its turn, in `bodies.py`.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import h11
import msgspec
import structlog
from litestar.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pantala.server.refusals import refuse
from pantala.wire.api import ErrorBody

log = structlog.get_logger()

HEAD_WITHIN_S = 10.0
UNREAD_S = 30.0
CONNECTIONS_MAX = 4096
TOLD_EVERY_S = 10.0
RETRY_AFTER_S = 5
_FULL = msgspec.json.encode(ErrorBody(error="too many connections; nothing was done", status="rate_limited"))


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """`unread_s`: an answer, or what is left of it, that the client does not take. Connections above `connections_max`
    are answered 429, twice as many are not even accepted."""

    head_s: float = HEAD_WITHIN_S
    unread_s: float = UNREAD_S
    connections_max: int = CONNECTIONS_MAX


class Ended:
    """Connections that were ended for their clients' sake, by reason; one line in the log for many."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._told_at = -TOLD_EVERY_S

    def count(self, why: str, now: float) -> None:
        self.counts[why] += 1
        if now - self._told_at >= TOLD_EVERY_S:
            self._told_at = now
            log.warning("connections ended", reasons=dict(self.counts))


class Connection(H11Protocol):
    """A subclass of it says what holds for its server: `made`."""

    bounds = Bounds()
    ended = Ended()

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        here = len(self.connections)
        if here > 2 * self.bounds.connections_max:
            self._end("far too many")
            return
        if here > self.bounds.connections_max:
            self.ended.count("too many", self.loop.time())
            self.app = _refuse
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head()
        self._cancel_unread()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """It is closed once the rest of the last answer has been taken."""
        super().timeout_keep_alive_handler()
        self._await_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._cancel_unread()
        super().resume_writing()

    def _await_head(self) -> None:
        if self._head is None and self.conn.their_state is h11.IDLE:
            self._head = self.loop.call_later(self.bounds.head_s, self._end, "head not whole")

    def _await_reader(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self.bounds.unread_s, self._end, "answer not read")

    def _end(self, why: str) -> None:
        self.ended.count(why, self.loop.time())
        self.transport.abort()

    def _cancel_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def made(bounds: Bounds, ended: Ended) -> type[Connection]:
    """The connections of one server."""

    class Made(Connection):
        pass

    Made.bounds, Made.ended = bounds, ended
    return Made


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    del scope, receive
    await refuse(send, 429, _FULL, [(b"retry-after", str(RETRY_AFTER_S).encode()), (b"connection", b"close")])
