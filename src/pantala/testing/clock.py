"""A clock that tests move by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import anyio

from pantala.kit.clock import until_tick


class ManualClock:
    """`advance` wakes every sleeper whose time has come, in order."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed_s = 0.0
        self._sleepers: list[tuple[float, anyio.Event]] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed_s)

    def monotonic(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        event = anyio.Event()
        self._sleepers.append((self._elapsed_s + seconds, event))
        await event.wait()

    async def tick(self, every_s: float) -> None:
        await self.sleep(until_tick(self._elapsed_s, every_s))

    async def advance(self, seconds: float) -> None:
        target = self._elapsed_s + seconds
        while due := sorted((s for s in self._sleepers if s[0] <= target), key=lambda s: s[0]):
            at, event = due[0]
            self._sleepers.remove(due[0])
            self._elapsed_s = at
            event.set()
            await anyio.wait_all_tasks_blocked()
        self._elapsed_s = target
        await anyio.wait_all_tasks_blocked()
