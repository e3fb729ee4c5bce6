"""The semantics of `pantala.drivers.protocol`, held against every driver."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from pantala.drivers.protocol import Driver, LogRecord, Runtime
from pantala.errors import DriverError
from pantala.testing import driver_harness as h
from pantala.testing.driver_harness import ContainerHarness, FakeHarness
from pantala.testing.poll import until
from pantala.wire.guest import Exec, Start

pytestmark = pytest.mark.anyio

Harness = FakeHarness | ContainerHarness
WITHIN_S = 20.0


@pytest.fixture(params=["fake", pytest.param("container", marks=pytest.mark.root)])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    making = h.fake_harness() if request.param == "fake" else h.container_harness(tmp_path / "host")
    with making as made:
        yield made


async def running(harness: Harness, start: Start, **spec: str | int) -> tuple[Driver, str]:
    driver = harness.driver()
    wanted = harness.spec(**spec)  # type: ignore[arg-type]  # a test's short way to name fields
    await driver.prepare(wanted)
    await driver.start(wanted.machine_id, start)
    return driver, wanted.machine_id


def command(start: Start, *, timeout_ms: int = 20_000) -> Exec:
    return Exec(argv=start.argv, timeout_ms=timeout_ms)


async def ended(driver: Driver, machine_id: str) -> Runtime:
    with anyio.fail_after(WITHIN_S):
        return await driver.wait(machine_id)


async def said(driver: Driver, machine_id: str, lines: int) -> list[LogRecord]:
    return await until(lambda: driver.logs(machine_id, 0), lambda seen: len(seen) >= lines, within_s=WITHIN_S)


async def test_a_machine_is_prepared_then_runs_then_has_an_exit_record(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    prepared = await driver.prepare(spec)
    assert (prepared.phase, prepared.instance_id, prepared.exit) == ("prepared", "01", None)

    assert await driver.start(spec.machine_id, h.EXITS_3) > 0
    after = await ended(driver, spec.machine_id)

    assert after.phase == "exited"
    assert after.exit is not None
    assert (after.exit.exit_code, after.exit.signal, after.exit.requested_stop) == (3, 0, False)
    assert after.exit.exited_at_ms >= after.exit.started_at_ms > 0
    assert await driver.inspect(spec.machine_id) == after


async def test_an_app_ended_by_a_signal_has_its_number(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.KILLS_ITSELF)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert (after.exit.exit_code, after.exit.signal) == (137, 9)
    assert not after.oom_killed


async def test_nothing_is_known_of_a_machine_that_never_was(harness: Harness) -> None:
    driver = harness.driver()
    assert await driver.inspect("00000000000000") is None
    assert await driver.list() == []
    assert await driver.logs("00000000000000", 0) == []
    await driver.destroy("00000000000000")
    with pytest.raises(DriverError):
        await driver.start("00000000000000", h.RUNS)


async def test_prepare_twice_returns_the_same_machine(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    first = await driver.prepare(spec)
    assert await driver.prepare(spec) == first
    assert await driver.list() == [spec.machine_id]


async def test_prepare_refuses_another_instance_of_a_live_machine(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    with pytest.raises(DriverError, match="instance 01"):
        await driver.prepare(harness.spec(machine_id=spec.machine_id, instance_id="02"))


async def test_an_ended_machine_is_prepared_anew_under_the_same_id(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.EXITS_3)
    first = await ended(driver, machine_id)
    again = await driver.prepare(harness.spec(machine_id=machine_id, instance_id="02"))
    assert (again.phase, again.instance_id, again.exit) == ("prepared", "02", None)
    assert again.pid != first.pid
    assert await driver.logs(machine_id, 0) == []


async def test_a_repeated_start_answers_with_the_running_app(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    pid = await driver.start(machine_id, h.RUNS)
    assert await driver.start(machine_id, h.EXITS_3) == pid
    runtime = await driver.inspect(machine_id)
    assert runtime is not None
    assert runtime.phase == "running"


async def test_stop_gives_the_app_its_signal(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.GRACEFUL)
    await said(driver, machine_id, 1)
    await driver.stop(machine_id, signal=h.TERM, grace_s=30)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert (after.exit.exit_code, after.exit.signal, after.exit.requested_stop) == (7, 0, True)
    await driver.stop(machine_id, signal=h.TERM, grace_s=30)  # nothing left to stop


async def test_stop_kills_after_the_grace(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.STUBBORN)
    await said(driver, machine_id, 1)
    await driver.stop(machine_id, signal=h.TERM, grace_s=0.2)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert (after.exit.exit_code, after.exit.signal, after.exit.requested_stop) == (137, 9, True)


async def test_a_later_stop_may_shorten_the_grace(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.STUBBORN)
    await said(driver, machine_id, 1)
    await driver.stop(machine_id, signal=h.TERM, grace_s=1000)
    await driver.stop(machine_id, signal=h.TERM, grace_s=0.1)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert after.exit.signal == 9


async def test_a_stop_is_kept_although_its_caller_died(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.STUBBORN)
    await said(driver, machine_id, 1)
    await harness.stop_and_die(machine_id, grace_s=0.3)
    after = await ended(harness.driver(), machine_id)
    assert after.exit is not None
    assert (after.exit.signal, after.exit.requested_stop) == (9, True)


async def test_a_prepared_machine_can_be_stopped(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    await driver.stop(spec.machine_id, signal=h.TERM, grace_s=1)
    after = await ended(driver, spec.machine_id)
    assert after.exit is not None
    assert (after.exit.exit_code, after.exit.requested_stop) == (0, True)


async def test_signals_reach_the_app(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    await driver.signal(machine_id, h.USR1)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert (after.exit.signal, after.exit.requested_stop) == (h.USR1, False)


async def test_a_signal_before_the_start_is_refused(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    with pytest.raises(DriverError, match="not started"):
        await driver.signal(spec.machine_id, h.USR1)


async def test_the_processes_of_what_runs_are_told_by_their_numbers_inside(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    init, app = await driver.processes(machine_id)
    assert (init.pid, app.command, app.directory) == (1, "sleep 1000", "/")
    assert app.rss_bytes > 0
    await driver.destroy(machine_id)
    assert await driver.processes(machine_id) == []


async def test_a_command_runs_beside_the_app(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    ended = await driver.exec(machine_id, command(h.PRINTS_AND_FAILS))
    assert (ended.exit_code, ended.signal, ended.timed_out) == (3, 0, False)
    assert (base64.b64decode(ended.stdout_base64), base64.b64decode(ended.stderr_base64)) == (b"one\n", b"oops\n")
    found = await driver.inspect(machine_id)
    assert found is not None
    assert found.phase == "running"


async def test_a_command_that_takes_too_long_is_killed(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    ended = await driver.exec(machine_id, command(h.RUNS, timeout_ms=50))
    assert (ended.exit_code, ended.signal, ended.timed_out) == (137, h.KILL, True)


async def test_a_command_that_cannot_run_says_why(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    with pytest.raises(DriverError, match="not found") as refused:
        await driver.exec(machine_id, command(h.MISSING))
    assert refused.value.guest_fault


async def test_no_command_runs_before_the_app(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    with pytest.raises(DriverError, match="not started"):
        await driver.exec(spec.machine_id, command(h.PRINTS_AND_FAILS))


async def test_another_caller_adopts_what_runs(harness: Harness) -> None:
    _, machine_id = await running(harness, h.RUNS)
    other = harness.driver()
    assert await other.list() == [machine_id]
    found = await other.inspect(machine_id)
    assert found is not None
    assert found.phase == "running"
    await other.stop(machine_id, signal=h.TERM, grace_s=5)
    after = await ended(other, machine_id)
    assert after.exit is not None
    assert after.exit.signal == h.TERM


async def test_a_command_that_is_not_there_is_the_guests_fault(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    with pytest.raises(DriverError, match=r"/no/such/program.* not found") as refused:
        await driver.start(spec.machine_id, h.MISSING)
    assert refused.value.guest_fault
    after = await ended(driver, spec.machine_id)
    assert after.exit is not None
    assert after.exit.exit_code == 127
    assert "not found" in after.exit.reason


async def test_logs_continue_where_a_reader_left_off(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.PRINTS)
    seen = await said(driver, machine_id, 4)
    assert [r.text for r in seen if r.stream == "stdout"] == ["one", "two", "three"]
    assert [r.text for r in seen if r.stream == "stderr"] == ["oops"]
    assert all(record.timestamp_ns > 10**18 for record in seen)
    assert await harness.driver().logs(machine_id, seen[1].position) == seen[2:]
    assert await driver.logs(machine_id, seen[-1].position) == []


async def test_logs_stay_readable_until_destroy(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.PRINTS)
    await said(driver, machine_id, 4)
    await driver.stop(machine_id, signal=h.TERM, grace_s=5)
    await ended(driver, machine_id)
    assert len(await driver.logs(machine_id, 0)) == 4
    await driver.destroy(machine_id)
    assert await driver.logs(machine_id, 0) == []


async def test_an_app_that_eats_its_memory_is_reported_as_oom_killed(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.EATS_MEMORY, memory_mib=32)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert (after.exit.signal, after.oom_killed) == (9, True)


async def test_a_suspended_machine_does_nothing_until_it_goes_on_where_it_was(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.STUBBORN)
    before = await driver.inspect(machine_id)
    await said(driver, machine_id, 1)
    await driver.suspend(machine_id)
    await driver.suspend(machine_id)
    asleep = await driver.inspect(machine_id)
    assert before is not None
    assert asleep is not None
    assert (asleep.phase, asleep.pid) == ("suspended", before.pid)
    await driver.resume(machine_id)
    await driver.resume(machine_id)
    assert await driver.inspect(machine_id) == before


@pytest.mark.root
def test_a_suspended_machine_gets_no_cpu_and_keeps_its_memory(tmp_path: Path) -> None:
    async def count(harness: ContainerHarness) -> None:
        driver, machine_id = await running(harness, h.COUNTS)
        await said(driver, machine_id, 3)
        await driver.suspend(machine_id)
        first = await driver.logs(machine_id, 0)
        await anyio.sleep(0.2)  # ten rounds of a loop that does not run
        assert await driver.logs(machine_id, 0) == first
        await driver.resume(machine_id)
        after = await said(driver, machine_id, len(first) + 3)
        assert [int(line.text) for line in after] == list(range(1, len(after) + 1)), (
            "it went on with what it had counted"
        )

    with h.container_harness(tmp_path / "host") as made:
        anyio.run(count, made)


async def test_what_a_killed_caller_suspended_is_found_suspended(harness: Harness) -> None:
    _, machine_id = await running(harness, h.RUNS)
    await harness.suspend_and_die(machine_id)
    other = harness.driver()
    found = await other.inspect(machine_id)
    assert found is not None
    assert found.phase == "suspended"
    await other.resume(machine_id)
    again = await other.inspect(machine_id)
    assert again is not None
    assert again.phase == "running"


async def test_a_suspended_machine_can_be_stopped_gracefully(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.GRACEFUL)
    await said(driver, machine_id, 1)
    await driver.suspend(machine_id)
    with pytest.raises(DriverError, match="suspended"):
        await driver.signal(machine_id, h.USR1)
    await driver.stop(machine_id, signal=h.TERM, grace_s=30)
    after = await ended(driver, machine_id)
    assert after.exit is not None
    assert (after.exit.exit_code, after.exit.requested_stop) == (7, True)


async def test_what_does_not_run_cannot_be_suspended(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    with pytest.raises(DriverError):
        await driver.resume(spec.machine_id)
    await driver.prepare(spec)
    with pytest.raises(DriverError, match="does not run"):
        await driver.suspend(spec.machine_id)
    await driver.start(spec.machine_id, h.EXITS_3)
    await ended(driver, spec.machine_id)
    with pytest.raises(DriverError, match="does not run"):
        await driver.suspend(spec.machine_id)
    with pytest.raises(DriverError, match="gone"):
        await driver.resume(spec.machine_id)


@pytest.mark.parametrize("phase", ["prepared", "running", "suspended", "exited"])
async def test_destroy_leaves_nothing(harness: Harness, phase: str) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    if phase != "prepared":
        await driver.start(spec.machine_id, h.EXITS_3 if phase == "exited" else h.RUNS)
    if phase == "suspended":
        await driver.suspend(spec.machine_id)
    if phase == "exited":
        await ended(driver, spec.machine_id)
    assert harness.leftovers(spec.machine_id) != []

    await driver.destroy(spec.machine_id)

    assert harness.leftovers(spec.machine_id) == []
    assert await driver.inspect(spec.machine_id) is None
    assert await driver.list() == []
    await driver.destroy(spec.machine_id)


# The second and third moment: the helper is at work, and goes on while its caller is dead.
MOMENTS = ["attempt", "init.sock", "console"]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_what_a_crashed_prepare_left_is_found_and_removed(harness: Harness, moment: str) -> None:
    spec = harness.spec()
    await harness.break_prepare(spec, moment)
    driver = harness.driver()
    assert await driver.list() == [spec.machine_id]
    await driver.destroy(spec.machine_id)
    assert harness.leftovers(spec.machine_id) == []


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_crashed_prepare_can_be_repeated(harness: Harness, moment: str) -> None:
    spec = harness.spec()
    await harness.break_prepare(spec, moment)
    driver = harness.driver()
    assert (await driver.prepare(spec)).phase == "prepared"
    await driver.start(spec.machine_id, h.EXITS_3)
    after = await ended(driver, spec.machine_id)
    assert after.exit is not None
    assert after.exit.exit_code == 3


async def test_several_wait_for_the_same_end(harness: Harness) -> None:
    driver, machine_id = await running(harness, h.RUNS)
    seen: list[Runtime] = []

    async def wait() -> None:
        seen.append(await driver.wait(machine_id))

    with anyio.fail_after(WITHIN_S):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(wait)
            await driver.stop(machine_id, signal=h.TERM, grace_s=5)
    assert [runtime.phase for runtime in seen] == ["exited"] * 3


async def test_the_probe_runs_something(harness: Harness) -> None:
    driver = harness.driver()
    probe = await driver.probe()
    assert probe.ok, probe.detail
    assert await driver.list() == []


async def test_cpu_time_is_counted_for_each_preparation_and_its_quota_taken(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    assert driver.cpu_usage(spec.machine_id) is None
    driver.set_cpu_quota(spec.machine_id, 5_000)  # nothing where the machine is not
    await driver.prepare(spec)
    first = driver.cpu_usage(spec.machine_id)
    assert first is not None
    driver.set_cpu_quota(spec.machine_id, 5_000)
    await driver.start(spec.machine_id, h.RUNS)
    again = harness.driver().cpu_usage(spec.machine_id)
    assert again is not None
    assert (again.run, again.used_us >= first.used_us) == (first.run, True)
    await driver.destroy(spec.machine_id)
    assert driver.cpu_usage(spec.machine_id) is None
    await driver.prepare(spec)
    other = driver.cpu_usage(spec.machine_id)
    assert other is not None
    assert other.run != first.run


async def test_the_limit_of_memory_changes_while_it_runs_and_not_for_its_next_preparation(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec(memory_mib=64)
    assert await driver.memory(spec.machine_id) is None
    with pytest.raises(DriverError):
        await driver.set_memory_limit(spec.machine_id, 32)
    await driver.prepare(spec)
    await driver.start(spec.machine_id, h.RUNS)
    for limit_mib in (32, 48):
        await driver.set_memory_limit(spec.machine_id, limit_mib)
        seen = await harness.driver().memory(spec.machine_id)
        assert seen is not None
        assert (seen.limit_mib, seen.used_mib <= limit_mib) == (limit_mib, True)
    assert await driver.reclaim_memory(spec.machine_id, 8) >= 0
    await driver.destroy(spec.machine_id)
    await driver.prepare(spec)
    again = await driver.memory(spec.machine_id)
    assert again is not None
    assert again.limit_mib == 64
