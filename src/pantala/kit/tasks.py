"""Small helpers around anyio's task groups."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


@asynccontextmanager
async def first_error() -> AsyncGenerator[None]:
    """Raise the first error of the task groups inside instead of their group, so that callers can tell it apart."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group


async def to_the_end(call: Coroutine[Any, Any, T]) -> T:
    """Await what must not be left half way (a request that was sent), also when cancelled; `call` has a deadline of
    its own. A cancellation is heard at the caller's next wait."""
    with anyio.CancelScope(shield=True):
        return await call
    raise AssertionError("unreachable: nobody cancels this scope")


@dataclass
class _Held:
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    users: int = 0


class KeyedLocks:
    """One lock a key, forgotten when nobody holds or awaits it."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def busy(self, key: str | None = None) -> bool:
        """Whether `key` (or, without one, anything) is held or awaited."""
        return key in self._held if key is not None else bool(self._held)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncGenerator[None]:
        held = self._held.setdefault(key, _Held())
        held.users += 1
        try:
            async with held.lock:
                yield
        finally:
            held.users -= 1
            if held.users == 0:
                del self._held[key]
