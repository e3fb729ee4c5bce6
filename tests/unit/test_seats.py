"""Which CPUs of its host a machine runs on, and what a machine is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.agent.governor import Subject
from pantala.agent.seating import Seating
from pantala.domain import guests
from pantala.domain.runtime import CPUUsage
from pantala.drivers.container.facts import cpuinfo
from pantala.drivers.fake import FakeDriver, FakeWorld
from pantala.planner import seats
from pantala.planner.seats import Move, Seat
from pantala.testing import driver_harness as h
from pantala.testing.clock import ManualClock
from pantala.wire.guest import Start
from pantala.wire.machine import Guest, MachineConfig

pytestmark = pytest.mark.anyio
HOST = frozenset(range(4))


def seat(*cpus: int, weight: float = 1.0) -> Seat:
    return Seat(cpus=frozenset(cpus), weight=weight)


def test_a_start_goes_where_least_is_promised() -> None:
    taken = {"a": seat(0), "b": seat(1, weight=1 / 16), "c": seat(3)}
    assert seats.choose(HOST, taken, 1) == {2}
    assert seats.choose(HOST, taken, 2) == {1, 2}
    assert seats.choose(HOST, taken, 4) == HOST
    assert seats.choose(HOST, taken, 16) == HOST


def test_sleeping_machines_count_only_where_nothing_else_differs() -> None:
    assert seats.choose(HOST, {"asleep": seat(0, weight=0)}, 1) == {1}
    assert seats.choose(frozenset({0, 1}), {"asleep": seat(0, weight=0), "awake": seat(1)}, 1) == {0}


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1 / 16, 1.0])), max_size=30))
def test_what_is_promised_is_spread_evenly(machines: list[tuple[int, float]]) -> None:
    taken: dict[str, Seat] = {}
    promised = dict.fromkeys(HOST, 0.0)
    for number, (count, weight) in enumerate(machines):
        chosen = seats.choose(HOST, taken, count)
        assert len(chosen) == count
        taken[str(number)] = Seat(cpus=chosen, weight=weight)
        for cpu in chosen:
            promised[cpu] += weight
    assert max(promised.values()) - min(promised.values()) <= 1.0


BUSY = st.fixed_dictionaries({cpu: st.floats(0, 1) for cpu in HOST})


@given(BUSY, st.lists(st.tuples(st.sets(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=3), st.floats(0, 4))))
def test_a_move_keeps_the_number_and_leaves_its_new_cpu_less_busy_than_the_old_one_was(
    busy: dict[int, float], machines: list[tuple[set[int], float]]
) -> None:
    taken = {str(number): seat(*cpus) for number, (cpus, _) in enumerate(machines)}
    used = {str(number): part for number, (_, part) in enumerate(machines)}
    hot = seats.hottest(busy, HOST)
    if hot is None:
        return
    move = seats.relieve(hot, busy, HOST, taken, used)
    if move is None:
        return
    assert move.old == taken[move.machine_id].cpus
    assert len(move.new) == len(move.old)
    assert hot in move.old - move.new
    (cold,) = move.new - move.old
    assert busy[cold] + used[move.machine_id] / len(move.old) < busy[hot]


def test_two_that_fight_over_a_cpu_part_and_one_alone_stays() -> None:
    busy = {0: 1.0, 1: 0.1, 2: 0.5, 3: 0.9}
    hot = seats.hottest(busy, HOST)
    assert hot == 0
    both = {"a": seat(0), "b": seat(0)}
    move = seats.relieve(hot, busy, HOST, both, {"a": 0.4, "b": 0.5})
    assert move == Move(machine_id="b", old=frozenset({0}), new=frozenset({1}))
    assert seats.relieve(hot, busy, HOST, {"a": seat(0)}, {"a": 0.99}) is None
    assert seats.hottest(dict.fromkeys(HOST, 0.95), HOST) is None, "there is nowhere to go"
    assert seats.hottest({}, HOST) is None


# -- the agent's side ------------------------------------------------------------------------------------------------


class AskedDriver(FakeDriver):
    """Remembers of whom it was asked."""

    def __init__(self, world: FakeWorld) -> None:
        super().__init__(world)
        self.asked: list[str] = []

    def cpu_usage(self, machine_id: str) -> CPUUsage | None:
        self.asked.append(machine_id)
        return super().cpu_usage(machine_id)


class Rig:
    def __init__(self, tmp_path: Path) -> None:
        self.world = FakeWorld()
        self.driver = AskedDriver(self.world)
        self.clock = ManualClock()
        self.stat = tmp_path / "stat"
        self.sleeping: set[str] = set()
        self.ticks = {cpu: [0, 0] for cpu in HOST}
        self._write()
        self.seating = self.agent()

    def agent(self) -> Seating:
        return Seating(self.driver, self.clock, subjects=self.subjects, host=HOST, stat=self.stat)

    def subjects(self) -> Iterator[Subject]:
        for machine_id in self.world.machines:
            yield Subject(machine_id, "01", performance(1), machine_id not in self.sleeping)

    async def passed(self, seconds: float, busy: dict[int, float]) -> None:
        """So many seconds, in which CPUs were busy for so much of the time."""
        for cpu, ticks in self.ticks.items():
            ticks[0] += round(seconds * 100 * busy.get(cpu, 0))
            ticks[1] += round(seconds * 100 * (1 - busy.get(cpu, 0)))
        self._write()
        await self.clock.advance(seconds)

    def _write(self) -> None:
        lines = [f"cpu{cpu} {used} 0 0 {idle} 0 0 0 0 0 0" for cpu, (used, idle) in self.ticks.items()]
        self.stat.write_text("\n".join(["cpu  0 0 0 0 0 0 0 0 0 0", *lines, "intr 0"]) + "\n")

    async def start(self, machine_id: str) -> None:
        spec = h.FakeHarness().spec(machine_id=machine_id)
        await self.driver.prepare(spec)
        cpus = self.seating.take(machine_id, guests.resolve(performance(1)))
        await self.driver.start(machine_id, Start(argv=["app"], env={}, cpus=cpus))


def performance(cpus: int) -> MachineConfig:
    return MachineConfig(guest=Guest(cpu_kind="performance", cpus=cpus, memory_mb=2048 * cpus))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_starts_are_spread_and_a_machine_of_the_hosts_size_runs_anywhere(rig: Rig) -> None:
    for name in "abcd":
        await rig.start(name)
    assert {rig.driver.cpus(name) for name in "abcd"} == {frozenset({cpu}) for cpu in HOST}
    assert rig.seating.take("large", guests.resolve(performance(4))) == []
    assert rig.seating.take("larger", guests.resolve(performance(16))) == []


async def test_another_agent_finds_who_runs_where(rig: Rig) -> None:
    for name in "abc":
        await rig.start(name)
    rig.seating = rig.agent()
    rig.seating.look()
    await rig.start("d")
    assert rig.driver.cpus("d") == {3}


async def test_who_sleeps_or_is_gone_leaves_its_cpu_to_others(rig: Rig) -> None:
    for name in "abcd":
        await rig.start(name)
    rig.sleeping = {"b"}
    rig.seating.look()
    await rig.start("e")
    assert rig.driver.cpus("e") == {1}
    await rig.driver.destroy("c")
    await rig.passed(61, {})
    rig.seating.look()
    await rig.start("f")
    assert rig.driver.cpus("f") == {2}


async def test_one_of_two_busy_ones_moves_to_an_idle_cpu(rig: Rig) -> None:
    for name in "abcde":
        await rig.start(name)
    assert rig.driver.cpus("a") == rig.driver.cpus("e") == {0}
    rig.seating.look()
    for _ in range(2):  # what they use is known after the second
        await rig.passed(2, {0: 1.0, 1: 0.2, 2: 0.1, 3: 0.3})
        for name in "ae":
            rig.world.machines[name].cpu_used_us += 1_000_000
        rig.seating.look()
    assert {rig.driver.cpus("a"), rig.driver.cpus("e")} == {frozenset({0}), frozenset({2})}


async def test_nothing_of_machines_is_read_while_no_cpu_is_busy(rig: Rig) -> None:
    await rig.start("a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.seating.run)
        await anyio.wait_all_tasks_blocked()
        for _ in range(5):
            await rig.passed(2, {0: 0.8})
        tasks.cancel_scope.cancel()
    assert rig.driver.asked == []


# -- what a machine is told ------------------------------------------------------------------------------------------

X86 = """processor\t: 0
model name\t: AMD EPYC
physical id\t: 0
siblings\t: 2
core id\t\t: 0
cpu cores\t: 2
flags\t\t: fpu

processor\t: 1
model name\t: AMD EPYC
physical id\t: 1
siblings\t: 2
core id\t\t: 0
cpu cores\t: 2
flags\t\t: fpu

"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\n\nprocessor\t: 1\nBogoMIPS\t: 50.00\n\nHardware\t: board\n"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cpuinfo_has_as_many_processors_as_the_machine(count: int) -> None:
    sections = cpuinfo(X86, count).strip().split("\n\n")
    said = [dict(line.split(": ") for line in section.splitlines()) for section in sections]
    assert [int(section["processor\t"]) for section in said] == list(range(count))
    assert {section["siblings\t"] for section in said} == {str(count)}
    assert {section["physical id\t"] for section in said} == {"0"}
    assert {section["model name\t"] for section in said} == {"AMD EPYC"}


def test_cpuinfo_keeps_what_is_of_no_processor() -> None:
    assert cpuinfo(ARM, 1) == "processor\t: 0\nBogoMIPS\t: 50.00\n\nHardware\t: board\n\n"
