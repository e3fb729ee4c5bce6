"""Gives each start its CPUs of the host, and moves a machine when two fight over one and another is idle.

`planner/seats.py` chooses; PID 1 takes the CPUs of a start from its message, so a wake waits for nothing here. What
runs where is the kernel's to know and read back from it, so another agent finds it. Sleeping machines are not looked
at; once every `LOOK_S` this reads one file of the kernel, and machines only while a CPU is busy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from pantala.agent.governor import Subject
from pantala.domain import guests
from pantala.drivers.protocol import Driver
from pantala.kit.clock import Clock
from pantala.planner import seats
from pantala.planner.seats import Seat

log = structlog.get_logger()

LOOK_S = 2.0
SEEN_WITHIN_S = 60.0
"""A start that was given its CPUs runs by then, or never did."""


class _Ticks(msgspec.Struct, frozen=True):
    busy: int
    whole: int


class Seating:
    """`subjects`: machines that run or are suspended. `host`: the CPUs that machines may have."""

    def __init__(
        self,
        driver: Driver,
        clock: Clock,
        *,
        subjects: Callable[[], Iterable[Subject]],
        host: frozenset[int] | None = None,
        stat: Path = Path("/proc/stat"),
    ) -> None:
        self._driver = driver
        self._clock = clock
        self._subjects = subjects
        self._host = host or frozenset(os.sched_getaffinity(0))
        self._stat = stat
        self._seats: dict[str, Seat] = {}
        self._given_at: dict[str, float] = {}
        self._ticks: dict[int, _Ticks] = {}
        self._used_us: dict[str, tuple[str, int]] = {}
        self._looked_at = 0.0

    def take(self, machine_id: str, size: guests.Size) -> list[int]:
        """For a start; empty where the machine has as many CPUs as the host, or more."""
        if size.cpus >= len(self._host):
            self._seats.pop(machine_id, None)
            return []
        others = {name: seat for name, seat in self._seats.items() if name != machine_id}
        chosen = seats.choose(self._host, others, size.cpus)
        self._seats[machine_id] = Seat(cpus=chosen, weight=_weight(size))
        self._given_at[machine_id] = self._clock.monotonic()
        return sorted(chosen)

    async def run(self) -> None:
        if len(self._host) == 1:
            return
        while True:
            self.look()
            await self._clock.sleep(LOOK_S)

    def look(self) -> None:
        """Count who is there; make at most one move."""
        self._count()
        busy, elapsed_s = self._busy(), self._clock.monotonic() - self._looked_at
        self._looked_at = self._clock.monotonic()
        hot = seats.hottest(busy, self._host)
        if hot is None:
            self._used_us = {}
            return
        used = self._used(hot, elapsed_s)
        move = seats.relieve(hot, busy, self._host, self._seats, used)
        if move is None:
            return
        self._driver.move_cpus(move.machine_id, move.old, move.new)
        self._seats[move.machine_id] = msgspec.structs.replace(self._seats[move.machine_id], cpus=move.new)
        log.info("machine moved to another CPU", machine=move.machine_id, left=hot, cpus=sorted(move.new))

    def _count(self) -> None:
        seen: set[str] = set()
        for subject in self._subjects():
            seen.add(subject.machine_id)
            seat = self._seats.get(subject.machine_id)
            size = guests.resolve(subject.config)
            weight = _weight(size) if subject.awake else 0.0
            if seat is None and size.cpus < len(self._host):
                # Of the agent before. One from before machines had CPUs has all of them, and keeps them.
                cpus = self._driver.cpus(subject.machine_id)
                if cpus is not None:
                    self._seats[subject.machine_id] = Seat(cpus=cpus, weight=weight)
            elif seat is not None and seat.weight != weight:
                self._seats[subject.machine_id] = msgspec.structs.replace(seat, weight=weight)
        long_ago = self._clock.monotonic() - SEEN_WITHIN_S
        for machine_id in self._seats.keys() - seen:
            if self._given_at.get(machine_id, long_ago) <= long_ago:
                del self._seats[machine_id]
                self._given_at.pop(machine_id, None)

    def _busy(self) -> dict[int, float]:
        """The part of its time that each CPU was busy since the last look."""
        now, before = _ticks(self._stat.read_text()), self._ticks
        self._ticks = now
        return {
            cpu: (ticks.busy - before[cpu].busy) / (ticks.whole - before[cpu].whole)
            for cpu, ticks in now.items()
            if cpu in before and ticks.whole > before[cpu].whole
        }

    def _used(self, hot: int, elapsed_s: float) -> dict[str, float]:
        """CPUs that those on `hot` used; of one that was not looked at before nothing is known yet."""
        before, self._used_us = self._used_us, {}
        used: dict[str, float] = {}
        for machine_id, seat in self._seats.items():
            if hot not in seat.cpus or not seat.weight:
                continue
            usage = self._driver.cpu_usage(machine_id)
            if usage is None:
                continue
            self._used_us[machine_id] = (usage.run, usage.used_us)
            run, then_us = before.get(machine_id, ("", 0))
            if run == usage.run and elapsed_s > 0:
                used[machine_id] = (usage.used_us - then_us) / 1e6 / elapsed_s
        return used


def _weight(size: guests.Size) -> float:
    return size.cpu_share / size.cpus


def _ticks(stat: str) -> dict[int, _Ticks]:
    """From the text of `/proc/stat`: waiting for a disk is not busy; time taken by a hypervisor is."""
    found: dict[int, _Ticks] = {}
    for line in stat.splitlines():
        name, _, rest = line.partition(" ")
        if not name.startswith("cpu"):
            break
        if name == "cpu":
            continue
        numbers = [int(word) for word in rest.split()[:8]]
        found[int(name.removeprefix("cpu"))] = _Ticks(sum(numbers) - numbers[3] - numbers[4], sum(numbers))
    return found
