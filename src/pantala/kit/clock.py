"""Time as a constructor argument, so that tests move it and nothing waits for real."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

import anyio

EARLY_MAX = 0.05


class Clock(Protocol):
    def now(self) -> datetime:
        """Wall clock, aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that only grow; for deadlines and durations."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    async def tick(self, every_s: float) -> None:
        """Sleep until the next multiple of `every_s` on this clock. Tasks of one process that look at something about
        that often all look when one of them does: what an idle process costs is how often it is woken."""
        ...


class SystemClock:
    def __init__(self) -> None:
        self._origin = time.monotonic()  # processes that share a machine do not wake all at once

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def tick(self, every_s: float) -> None:
        await anyio.sleep(until_tick(self.monotonic() - self._origin, every_s))


def until_tick(at_s: float, every_s: float) -> float:
    """A timer may end a little early: that tick is over then."""
    left_s = every_s - at_s % every_s
    return left_s if left_s > every_s * EARLY_MAX else left_s + every_s


def unix_ms(moment: datetime) -> int:
    """Milliseconds since the epoch of an aware datetime."""
    if moment.tzinfo is None:
        raise ValueError("naive datetime")
    return int(moment.timestamp() * 1000)


def rfc3339(moment: datetime) -> str:
    """UTC with a trailing Z, as the Machines API prints times."""
    if moment.tzinfo is None:
        raise ValueError("naive datetime")
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def rfc3339_ms(at_ms: int) -> str:
    """The same of milliseconds since the epoch."""
    return rfc3339(datetime.fromtimestamp(at_ms / 1000, UTC))
