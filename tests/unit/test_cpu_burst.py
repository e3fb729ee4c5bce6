"""The balance of shared CPUs, and the governor that keeps it over a driver whose CPU time the test hands out."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.agent.governor import LOOK_MOST_S, Governor, Subject
from pantala.domain import burst
from pantala.drivers.fake import FakeDriver, FakeWorld
from pantala.testing import driver_harness as h
from pantala.testing.clock import ManualClock
from pantala.wire.machine import Guest, MachineConfig

SECOND = 1_000_000
CPUS = st.sampled_from([1, 2, 4, 6, 8])


# -- the arithmetic: an 80 ms period, 5 ms a shared CPU, 5 s at first, 500 s at most ---------------------------------


@pytest.mark.parametrize("cpus", [1, 2, 4, 6, 8])
def test_a_shared_cpu_earns_5_ms_of_80_and_bursts_on_all_of_them(cpus: int) -> None:
    assert burst.PERIOD_US == 80_000
    assert burst.quota_us(cpus, throttled=True) == cpus * 5_000
    assert burst.quota_us(cpus, throttled=False) == cpus * 80_000
    assert burst.earned_us(cpus, 16 * SECOND) == cpus * SECOND
    assert burst.opening_us(cpus) == cpus * 5 * SECOND


@pytest.mark.parametrize("cpus", [1, 8])
def test_a_balance_lasts_its_size_over_the_share_that_is_not_earned(cpus: int) -> None:
    lasts_us = burst.unchanged_for_us(burst.opening_us(cpus), cpus=cpus, throttled=False)
    assert lasts_us == pytest.approx(5 * SECOND / (1 - 0.0625), abs=1)
    spent = burst.settled_us(burst.opening_us(cpus), cpus=cpus, elapsed_us=lasts_us, used_us=lasts_us * cpus)
    assert 0 <= spent <= 2 * cpus


@given(
    cpus=CPUS,
    balance=st.integers(-SECOND, 500 * SECOND),
    spans=st.lists(st.tuples(st.integers(0, 3600 * SECOND), st.floats(0, 1)), max_size=20),
)
def test_a_balance_is_what_was_earned_less_what_was_used(
    cpus: int, balance: int, spans: list[tuple[int, float]]
) -> None:
    balance *= cpus
    for elapsed_us, part in spans:
        used_us = int(elapsed_us * cpus * part)
        after = burst.settled_us(balance, cpus=cpus, elapsed_us=elapsed_us, used_us=used_us)
        exact = balance + elapsed_us * cpus / 16 - used_us
        assert -SECOND * cpus <= after <= 500 * SECOND * cpus
        if -SECOND * cpus < exact < 500 * SECOND * cpus:
            assert after == pytest.approx(exact, abs=1)
        balance = after


@given(
    cpus=CPUS, balance=st.integers(-SECOND, 500 * SECOND), elapsed=st.integers(0, 100 * SECOND), part=st.floats(0, 1)
)
def test_a_machine_is_held_back_only_at_empty_and_nobody_has_to_look_earlier(
    cpus: int, balance: int, elapsed: int, part: float
) -> None:
    balance *= cpus
    for was in (False, True):
        throttled = burst.is_throttled(balance, cpus=cpus, was=was)
        assert throttled == (balance <= 0 if not was else balance < burst.RESUME_US * cpus)
        quiet_us = burst.unchanged_for_us(balance, cpus=cpus, throttled=throttled)
        span_us = min(elapsed, max(0, quiet_us - 1))
        used_us = int(part * span_us / burst.PERIOD_US * burst.quota_us(cpus, throttled=throttled))
        after = burst.settled_us(balance, cpus=cpus, elapsed_us=span_us, used_us=used_us)
        assert span_us == 0 or burst.is_throttled(after, cpus=cpus, was=throttled) == throttled


# -- the governor ----------------------------------------------------------------------------------------------------


class Rig:
    """Machines whose apps run when the test says so: `run(seconds, id=cpus)` lets the quota decide what they get."""

    def __init__(self, file: Path | None = None) -> None:
        self.clock = ManualClock()
        self.harness = h.FakeHarness()
        self.world: FakeWorld = self.harness.world
        self.driver = FakeDriver(self.world)
        self.subjects: dict[str, Subject] = {}
        self.file = file
        self.governor = self.agent()
        self.sleep_s = 0.0
        self.looks = 0

    def agent(self) -> Governor:
        return Governor(self.driver, self.clock, subjects=lambda: iter(list(self.subjects.values())), file=self.file)

    async def add(self, machine_id: str, guest: Guest, instance: str = "01") -> None:
        await self.driver.prepare(self.harness.spec(machine_id=machine_id, instance_id=instance))
        await self.driver.start(machine_id, h.RUNS)
        self.subjects[machine_id] = Subject(machine_id, instance, MachineConfig(guest=guest), True)

    def suspend(self, machine_id: str, *, awake: bool) -> None:
        self.subjects[machine_id] = msgspec.structs.replace(self.subjects[machine_id], awake=awake)

    def quota(self, machine_id: str) -> int:
        quota = self.world.machines[machine_id].cpu_quota_us
        return burst.PERIOD_US * 8 if quota is None else quota

    def balance_s(self, machine_id: str) -> float:
        shown = self.governor.shown(machine_id)
        assert shown is not None
        return shown.balance / 100

    async def run(self, seconds: float, **wants: float) -> dict[str, float]:
        """Time passes in periods; each machine takes what it wants (CPUs), at most its quota. CPU seconds used."""
        used = dict.fromkeys(wants, 0.0)
        for _ in range(round(seconds / 0.08)):
            if self.sleep_s <= 0:
                self.sleep_s = self.governor.look()
                self.looks += 1
            for machine_id, cpus in wants.items():
                took_us = min(int(cpus * burst.PERIOD_US), self.quota(machine_id))
                self.world.machines[machine_id].cpu_used_us += took_us
                used[machine_id] += took_us / SECOND
            await self.clock.advance(0.08)
            self.sleep_s -= 0.08
        return used


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "cpu-balances.json")


pytestmark = pytest.mark.anyio
SHARED = Guest(cpu_kind="shared", cpus=1)


async def test_a_busy_machine_bursts_for_its_balance_and_then_gets_its_share(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    burst_s = (await rig.run(5.6, m1=1.0))["m1"]
    assert burst_s == pytest.approx(5 / (1 - 0.0625), abs=0.2)
    assert rig.quota("m1") == 5_000
    later = await rig.run(80, m1=1.0)
    assert later["m1"] == pytest.approx(80 * 0.0625, abs=0.2)
    assert rig.balance_s("m1") == pytest.approx(0, abs=0.1)


async def test_eight_cpus_pool_what_they_save_and_burst_as_long(rig: Rig) -> None:
    await rig.add("m1", Guest(cpu_kind="shared", cpus=8))
    assert (await rig.run(5.2, m1=8.0))["m1"] == pytest.approx(5.2 * 8, abs=0.1)
    assert rig.quota("m1") == 8 * 80_000
    await rig.run(0.5, m1=8.0)
    assert rig.quota("m1") == 8 * 5_000
    # one busy CPU of eight may have what all of them earn
    assert (await rig.run(16, m1=1.0))["m1"] == pytest.approx(16 * 0.5, abs=0.2)


async def test_what_is_saved_is_kept_up_to_500_s(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(160, m1=0.0)
    assert rig.balance_s("m1") == pytest.approx(5 + 10, abs=0.1)
    rig.governor.look()
    await rig.clock.advance(24 * 3600)
    assert rig.balance_s("m1") == 500
    assert (await rig.run(160, m1=1.0))["m1"] == pytest.approx(160, abs=0.1)


async def test_a_held_back_machine_that_rests_bursts_again_without_flapping(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(10, m1=1.0)
    assert rig.quota("m1") == 5_000
    await rig.run(16, m1=0.0)
    assert rig.quota("m1") == 80_000
    assert (await rig.run(0.8, m1=1.0))["m1"] == pytest.approx(0.8, abs=0.01)
    await rig.run(1, m1=1.0)
    changes = 0
    for _ in range(200):
        before = rig.quota("m1")
        await rig.run(0.08, m1=1.0)
        changes += before != rig.quota("m1")
    assert changes == 0


async def test_short_rests_do_not_free_and_hold_back_by_turns(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(10, m1=1.0)
    changes, before = 0, rig.quota("m1")
    for _ in range(60):
        for wants in (0.0, 1.0):
            await rig.run(0.16 if wants == 0 else 0.8, m1=wants)
            changes += rig.quota("m1") != before
            before = rig.quota("m1")
    assert changes <= 20


async def test_a_performance_machine_is_left_alone(rig: Rig) -> None:
    await rig.add("m1", Guest(cpu_kind="performance", cpus=2))
    assert (await rig.run(30, m1=2.0))["m1"] == pytest.approx(60, abs=0.1)
    assert rig.world.machines["m1"].cpu_quota_us is None
    shown = rig.governor.shown("m1")
    assert shown is not None
    assert (shown.baseline, shown.throttled) == (200, False)


async def test_neighbours_keep_their_own_balances(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.add("m2", SHARED)
    await rig.run(20, m1=1.0, m2=0.0)
    assert (rig.quota("m1"), rig.quota("m2")) == (5_000, 80_000)
    assert rig.balance_s("m2") == pytest.approx(5 + 20 / 16, abs=0.1)


async def test_a_machine_with_much_saved_is_looked_at_rarely(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.clock.advance(0.1)
    rig.governor.look()
    await rig.clock.advance(3600)
    assert rig.balance_s("m1") == pytest.approx(5 + 225, abs=0.1)
    reads: list[str] = []
    ask = rig.driver.cpu_usage
    rig.driver.cpu_usage = lambda machine_id: (reads.append(machine_id), ask(machine_id))[1]
    for _ in range(60):
        await rig.clock.advance(rig.governor.look())
    assert len(reads) <= 60 / LOOK_MOST_S + 1


async def test_hundreds_of_machines_are_seen_in_parts_and_all_soon(rig: Rig) -> None:
    for number in range(200):
        await rig.add(f"m{number}", SHARED)
    rig.governor.look()
    known = [name for name in rig.subjects if rig.governor.shown(name) is not None]
    assert 0 < len(known) < 200
    await rig.run(0.8)
    assert all(rig.governor.shown(name) is not None for name in rig.subjects)


async def test_another_agent_counts_on_from_what_the_last_one_saved(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(20, m1=1.0)
    await saved(rig)
    rig.world.machines["m1"].cpu_quota_us = None  # written by whoever was killed before it saved
    await rig.clock.advance(32)  # nobody looks
    await saved(rig, rig.agent())
    assert rig.balance_s("m1") == pytest.approx(2, abs=0.2)
    assert rig.quota("m1") == 80_000


async def test_a_quota_whose_verdict_was_never_saved_is_put_right(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(2, m1=1.0)
    await saved(rig)
    rig.driver.set_cpu_quota("m1", 5_000)  # by an agent that was killed at once
    await saved(rig, rig.agent())
    assert rig.quota("m1") == 80_000


async def test_an_agent_that_finds_no_balances_begins_anew_and_writes_the_quota(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(20, m1=1.0)
    assert rig.quota("m1") == 5_000
    rig.world.machines["m1"].cpu_used_us = SECOND
    rig.governor = Governor(rig.driver, rig.clock, subjects=lambda: iter(list(rig.subjects.values())))
    rig.governor.look()
    assert rig.quota("m1") == 80_000
    assert rig.balance_s("m1") == pytest.approx(4, abs=0.1)


async def test_a_start_begins_with_5_s_and_a_suspended_machine_keeps_what_it_had(rig: Rig) -> None:
    await rig.add("m1", SHARED)
    await rig.run(3, m1=1.0)
    left_s = rig.balance_s("m1")
    rig.suspend("m1", awake=False)
    await rig.run(160)
    rig.suspend("m1", awake=True)
    await rig.run(2)
    assert rig.balance_s("m1") == pytest.approx(left_s + 2 / 16, abs=0.1)

    await rig.driver.destroy("m1")
    await rig.add("m1", SHARED)  # the same version, started again
    await rig.run(4)  # seen when the balance before could have run out
    assert rig.balance_s("m1") == pytest.approx(5, abs=0.2)

    del rig.subjects["m1"]
    rig.governor.look()
    assert rig.governor.shown("m1") is None


async def saved(rig: Rig, governor: Governor | None = None) -> None:
    """As when an agent runs for a moment and is told to end."""
    if governor is not None:
        rig.governor = governor
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.governor.run)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
