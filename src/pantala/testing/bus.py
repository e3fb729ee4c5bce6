"""The bus in memory: same semantics as core NATS, no loss, no order between subjects."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import anyio

from pantala.errors import NodeUnreachable
from pantala.kit.bus import Handler


def matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: `*` one token, `>` the rest (at least one)."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, part in enumerate(wanted):
        if part == ">":
            return len(given) > index
        if index >= len(given) or part not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


class MemoryBus:
    def __init__(self) -> None:
        self._handlers: list[tuple[str, Handler]] = []
        self.down = False

    @contextmanager
    def connection(self) -> Generator[None]:
        """Whoever begins to serve within this scope has gone away after it."""
        before = list(self._handlers)
        try:
            yield
        finally:
            self._handlers = before

    async def publish(self, subject: str, payload: bytes) -> None:
        if self.down:
            return
        for pattern, handler in list(self._handlers):
            if matches(pattern, subject):
                await handler(subject, payload)

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        if not self.down:
            for pattern, handler in list(self._handlers):
                if matches(pattern, subject):
                    with anyio.move_on_after(timeout_s):
                        answer = await handler(subject, payload)
                        if answer is not None:
                            return answer
                    raise NodeUnreachable(f"no answer on {subject} within {timeout_s:g} s")
        raise NodeUnreachable(f"nobody serves {subject}")

    async def serve(self, subject: str, handler: Handler) -> None:
        self._handlers.append((subject, handler))
