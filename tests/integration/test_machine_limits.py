"""What one machine may use, held by the kernel: CPU by its balance, memory, disk; its neighbours notice nothing."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import anyio
import msgspec
import pytest

from pantala.agent.governor import Governor, Subject
from pantala.domain.burst import PERIOD_US
from pantala.domain.runtime import CPUUsage, MemoryUsage
from pantala.drivers.container import ContainerDriver
from pantala.errors import DriverError
from pantala.kit.clock import SystemClock
from pantala.testing import driver_harness as h
from pantala.testing.poll import until
from pantala.wire.guest import Exec, Start
from pantala.wire.machine import Guest, MachineConfig

pytestmark = [pytest.mark.anyio, pytest.mark.root]
T = TypeVar("T")
BUSY = h.shell("while :; do :; done")
PERIODS = 30
WITHIN_S = 60.0


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[h.ContainerHarness]:
    with h.container_harness(tmp_path / "host") as made:
        yield made


async def start(
    harness: h.ContainerHarness, app: Start, *, shared: bool = True, cpus: int = 1, memory_mib: int = 64
) -> tuple[ContainerDriver, str]:
    driver, spec = harness.driver(), harness.spec(memory_mib=memory_mib)
    limits = msgspec.structs.replace(spec.limits, shared_cpu=shared, cpus=cpus)
    await driver.prepare(msgspec.structs.replace(spec, limits=limits))
    await driver.start(spec.machine_id, app)
    return driver, spec.machine_id


def used(driver: ContainerDriver, machine_id: str) -> CPUUsage:
    usage = driver.cpu_usage(machine_id)
    assert usage is not None
    return usage


def look(at: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    async def looked() -> T:
        return at()

    return looked


async def share(driver: ContainerDriver, machine_id: str, *, periods: int = PERIODS) -> float:
    """The part of a CPU that it used, counted in the periods in which the kernel gave it quota, not in seconds: a test
    machine may be busy with others."""
    before = used(driver, machine_id)

    after = await until(
        look(lambda: used(driver, machine_id)), lambda seen: seen.periods >= before.periods + periods, within_s=WITHIN_S
    )
    return (after.used_us - before.used_us) / ((after.periods - before.periods) * PERIOD_US)


async def test_a_shared_cpu_bursts_then_gets_a_sixteenth_while_others_are_not_held_back(
    harness: h.ContainerHarness, tmp_path: Path
) -> None:
    """Its agent was replaced when 0.3 s were left: another one reads them from the file."""
    driver, busy = await start(harness, BUSY)
    _, idle = await start(harness, h.RUNS)
    kinds = {busy: "shared", idle: "shared"}
    file = tmp_path / "balances.json"

    def subjects() -> Iterator[Subject]:
        for machine_id, kind in kinds.items():
            yield Subject(machine_id, "01", MachineConfig(guest=Guest(cpu_kind=kind)), True)

    async with anyio.create_task_group() as tasks:
        governor = Governor(driver, SystemClock(), subjects=subjects, file=file)
        tasks.start_soon(governor.run)
        await until(look(lambda: governor.shown(busy)), lambda seen: seen is not None, within_s=WITHIN_S)
        tasks.cancel_scope.cancel()
    saved = json.loads(file.read_bytes())
    saved["ledgers"][busy]["balance_us"] = 300_000
    file.write_text(json.dumps(saved))
    before = used(driver, busy)

    async with anyio.create_task_group() as tasks:
        governor = Governor(driver, SystemClock(), subjects=subjects, file=file)
        tasks.start_soon(governor.run)
        await until(look(lambda: governor.shown(busy)), lambda seen: seen is not None and seen.throttled, within_s=60)
        spent = used(driver, busy)
        assert spent.used_us - before.used_us >= 300_000
        assert spent.throttled_us < 0.2 * spent.used_us, "it was held back before its balance was empty"

        assert await share(driver, busy) == pytest.approx(0.0625, rel=0.2)
        assert used(driver, busy).throttled_us > spent.throttled_us

        _, own = await start(harness, BUSY, shared=False)
        kinds[own] = "performance"
        neighbour = await until(look(lambda: used(driver, own)), lambda seen: seen.used_us > 1_000_000, within_s=60)
        assert neighbour.throttled_us < 0.05 * neighbour.used_us
        rested = governor.shown(idle)
        assert rested is not None
        assert (rested.throttled, rested.throttle) == (False, 0)
        assert rested.balance > 495, "it saved while it slept"
        tasks.cancel_scope.cancel()


async def test_two_shared_cpus_have_one_pool_that_one_thread_may_use(harness: h.ContainerHarness) -> None:
    driver, machine_id = await start(harness, BUSY, cpus=2)
    driver.set_cpu_quota(machine_id, 2 * 5_000)
    assert await share(driver, machine_id) == pytest.approx(0.125, rel=0.2)


@pytest.mark.needs_cgroup_v2
async def test_version_2_holds_the_same_quota(harness: h.ContainerHarness) -> None:
    driver, machine_id = await start(harness, BUSY)
    driver.set_cpu_quota(machine_id, 5_000)
    assert await share(driver, machine_id) == pytest.approx(0.0625, rel=0.2)


async def test_a_machine_that_runs_out_of_memory_ends_alone(harness: h.ContainerHarness) -> None:
    driver, neighbour = await start(harness, h.RUNS)
    _, greedy = await start(harness, h.EATS_MEMORY, memory_mib=32)
    with anyio.fail_after(WITHIN_S):
        ended = await driver.wait(greedy)
    assert ended.oom_killed
    assert ended.exit is not None
    assert ended.exit.signal == h.KILL
    left = await driver.inspect(neighbour)
    assert left is not None
    assert (left.phase, left.oom_killed) == ("running", False)
    assert len(await driver.processes(neighbour)) > 1


async def test_a_child_that_is_killed_for_memory_does_not_end_its_machine(harness: h.ContainerHarness) -> None:
    """The kernel takes the largest process, never PID 1 or a machine beside."""
    driver, machine_id = await start(harness, h.shell("tail /dev/zero; echo survived; sleep 1000"), memory_mib=32)
    lines = await until(lambda: driver.logs(machine_id, 0), lambda seen: len(seen) > 0, within_s=WITHIN_S)
    assert "survived" in [line.text for line in lines]
    runtime = await driver.inspect(machine_id)
    assert runtime is not None
    assert (runtime.phase, runtime.oom_killed) == ("running", True)


async def test_the_kernel_takes_machines_before_the_platform_when_the_host_itself_has_no_memory(
    harness: h.ContainerHarness,
) -> None:
    driver, machine_id = await start(harness, h.shell("cat /proc/1/oom_score_adj /proc/self/oom_score_adj; sleep 1000"))
    lines = await until(lambda: driver.logs(machine_id, 0), lambda seen: len(seen) >= 2, within_s=WITHIN_S)
    assert [int(line.text) for line in lines] == [500, 500]
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 500


async def test_a_full_root_disk_is_full_for_its_machine_only(harness: h.ContainerHarness) -> None:
    fill = "; ".join(f"dd if=/dev/zero of=/fill{n} bs=1M count=200 2>&1 | grep -c 'No space left'" for n in (1, 2))
    driver, full = await start(harness, h.shell(f"{fill}; sleep 1000"))
    lines = await until(lambda: driver.logs(full, 0), lambda seen: len(seen) >= 2, within_s=WITHIN_S)
    assert [line.text for line in lines if line.stream == "stdout"] == ["1", "1"]
    _, neighbour = await start(
        harness, h.shell("dd if=/dev/zero of=/fill bs=1M count=20 2>/dev/null && echo ok; sleep 1000")
    )
    lines = await until(lambda: driver.logs(neighbour, 0), lambda seen: len(seen) > 0, within_s=WITHIN_S)
    assert [line.text for line in lines] == ["ok"]


async def test_memory_is_taken_back_and_limited_while_it_runs_and_nothing_is_killed_for_it(
    harness: h.ContainerHarness,
) -> None:
    fill = "dd if=/dev/zero of=%s bs=1M count=%d 2>/dev/null"
    held, cached = fill % ("/dev/shm/held", 20), fill % ("/file", 24)
    app = h.shell(f"{held}; {cached}; sync; cat /file >/dev/null; echo ready; while :; do sleep 0.05; done")
    driver, machine_id = await start(harness, app)

    async def said() -> list[str]:
        return [record.text for record in await driver.logs(machine_id, 0)]

    await until(said, lambda lines: lines == ["ready"], within_s=WITHIN_S)
    before = await memory(driver, machine_id)
    assert (before.limit_mib, 20 <= before.used_mib < 64) == (64, True)
    assert await driver.reclaim_memory(machine_id, 16) >= 12
    await driver.set_memory_limit(machine_id, 32)
    assert (await memory(driver, machine_id)).limit_mib == 32
    with pytest.raises(DriverError, match="cannot give back, so 8 MiB are too few") as refused:
        await driver.set_memory_limit(machine_id, 8)
    assert refused.value.guest_fault
    assert (await memory(driver, machine_id)).limit_mib == 32
    runtime = await driver.inspect(machine_id)
    assert runtime is not None
    assert (runtime.phase, runtime.oom_killed) == ("running", False)

    takes = Exec(argv=["dd", "if=/dev/zero", "of=/dev/null", "bs=28M", "count=1"], env={"PATH": "/bin"})
    assert (await driver.exec(machine_id, takes)).signal == 9
    await driver.set_memory_limit(machine_id, 64)
    assert (await driver.exec(machine_id, takes)).exit_code == 0


async def memory(driver: ContainerDriver, machine_id: str) -> MemoryUsage:
    usage = await driver.memory(machine_id)
    assert usage is not None
    return usage
