"""Faults on the outermost seams of a control plane, drawn from seeded dice: the bus loses calls and answers, the
process dies at a call or at a write, before or after it took effect. Time passes only where somebody sleeps."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import anyio.lowlevel
from sqlalchemy import Connection

from pantala.errors import NodeUnreachable
from pantala.store.database import Database
from pantala.testing.bus import MemoryBus

T = TypeVar("T")


class Killed(Exception):
    """The control plane's process ends here."""


class FastClock:
    """Whoever sleeps moves the time and goes on."""

    def __init__(self) -> None:
        self._elapsed_s = 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._elapsed_s)

    def monotonic(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        self._elapsed_s += max(seconds, 0.0)
        await anyio.lowlevel.checkpoint()

    async def tick(self, every_s: float) -> None:
        await self.sleep(every_s)

    def advance(self, seconds: float) -> None:
        self._elapsed_s += seconds


class Faults:
    """Shares of calls and writes that go wrong; all 0 once `heal` was called."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.lost_call = dice.choice([0.0, 0.05, 0.2])
        self.lost_answer = dice.choice([0.0, 0.05, 0.2])
        self.killed = dice.choice([0.0, 0.01, 0.05])
        self.deaths = 0

    def heal(self) -> None:
        self.lost_call = self.lost_answer = self.killed = 0.0

    def happens(self, share: float) -> bool:
        return self.dice.random() < share

    def maybe_die(self) -> None:
        if self.happens(self.killed):
            self.deaths += 1
            raise Killed


class FaultyBus(MemoryBus):
    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        self._faults.maybe_die()
        if self._faults.happens(self._faults.lost_call):
            raise NodeUnreachable("lost on the way there")
        answer = await super().request(subject, payload, timeout_s=timeout_s)
        self._faults.maybe_die()
        if self._faults.happens(self._faults.lost_answer):
            raise NodeUnreachable("lost on the way back")
        return answer


class FaultyDatabase(Database):
    """The same database, whose writer may die before or after a commit."""

    def __init__(self, real: Database, faults: Faults) -> None:
        self._real = real
        self._faults = faults

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await self._real.read(work)

    async def write(self, work: Callable[[Connection], T]) -> T:
        self._faults.maybe_die()
        done = await self._real.write(work)
        self._faults.maybe_die()
        return done

    def close(self) -> None:
        self._real.close()
