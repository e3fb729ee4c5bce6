"""Control groups over plain directories that stand in for the kernel's, so that both versions are tried anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.domain.runtime import Limits
from pantala.drivers.container.cgroups import Cgroups, Hierarchies
from pantala.errors import DriverError
from pantala.testing.clock import ManualClock

LIMITS = Limits(cpus=1, shared_cpu=True, memory_mib=256, pids=50)


def unified(top: Path) -> Cgroups:
    return Cgroups(root="pantala/n1", clock=ManualClock(), hierarchies=Hierarchies(v1={}, unified=top))


def test_version_2_enables_controllers_on_the_way_down_and_limits_the_machine(tmp_path: Path) -> None:
    procs = unified(tmp_path).create("m1", LIMITS)
    assert procs == [tmp_path / "pantala/n1/m1/cgroup.procs"]
    for folder in (tmp_path, tmp_path / "pantala", tmp_path / "pantala/n1"):
        assert (folder / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    machine = tmp_path / "pantala/n1/m1"
    assert (machine / "pids.max").read_text() == "50"
    assert (machine / "cpu.max").read_text() == "80000 80000"
    assert not (machine / "cgroup.subtree_control").exists()


def test_version_2_limits_swap_and_shares_cpu_as_promised(tmp_path: Path) -> None:
    cgroups = unified(tmp_path)
    cgroups.create("m1", Limits(cpus=2, shared_cpu=True, memory_mib=256, swap_mib=512))
    cgroups.create("m2", Limits(cpus=2, shared_cpu=False, memory_mib=4096))
    first, second = (tmp_path / "pantala/n1" / name for name in ("m1", "m2"))
    assert (first / "memory.swap.max").read_text() == str(512 * 1024 * 1024)
    assert (second / "memory.swap.max").read_text() == "0"
    assert int((second / "cpu.weight").read_text()) == 16 * int((first / "cpu.weight").read_text())


def test_version_2_counts_cpu_time_and_takes_a_quota(tmp_path: Path) -> None:
    cgroups = unified(tmp_path)
    assert cgroups.cpu_usage("m1") is None
    cgroups.set_cpu_quota("m1", 5_000)
    cgroups.create("m1", LIMITS)
    machine = tmp_path / "pantala/n1/m1"
    (machine / "cpu.stat").write_text(
        "usage_usec 120000\nuser_usec 100000\nsystem_usec 20000\nnr_periods 12\nnr_throttled 9\nthrottled_usec 7000\n"
    )
    usage = cgroups.cpu_usage("m1")
    assert usage is not None
    assert (usage.used_us, usage.throttled_us, usage.periods) == (120_000, 7_000, 12)
    cgroups.set_cpu_quota("m1", 10_000)
    assert (machine / "cpu.max").read_text() == "10000 80000"


def test_version_1_counts_cpu_time_and_takes_a_quota(tmp_path: Path) -> None:
    v1 = {name: tmp_path / name for name in ("memory", "cpu", "cpuacct")}
    cgroups = Cgroups(root="pantala/n1", clock=ManualClock(), hierarchies=Hierarchies(v1=v1, unified=None))
    cgroups.create("m1", Limits(cpus=2, shared_cpu=True, memory_mib=256, swap_mib=512))
    (tmp_path / "cpuacct/pantala/n1/m1/cpuacct.usage").write_text("120000999\n")
    (tmp_path / "cpu/pantala/n1/m1/cpu.stat").write_text("nr_periods 12\nnr_throttled 9\nthrottled_time 7000000\n")
    usage = cgroups.cpu_usage("m1")
    assert usage is not None
    assert (usage.used_us, usage.throttled_us, usage.periods) == (120_000, 7_000, 12)
    cgroups.set_cpu_quota("m1", 10_000)
    assert (tmp_path / "cpu/pantala/n1/m1/cpu.cfs_quota_us").read_text() == "10000"
    memory = tmp_path / "memory/pantala/n1/m1"
    limit = int((memory / "memory.limit_in_bytes").read_text())
    assert int((memory / "memory.memsw.limit_in_bytes").read_text()) == limit + 512 * 1024 * 1024


def test_version_2_counts_kills_for_memory(tmp_path: Path) -> None:
    cgroups = unified(tmp_path)
    cgroups.create("m1", LIMITS)
    events = tmp_path / "pantala/n1/m1/memory.events"
    events.write_text("low 0\noom 3\noom_kill 0\n")
    assert not cgroups.oom_killed("m1")
    events.write_text("low 0\noom 3\noom_kill 1\n")
    assert cgroups.oom_killed("m1")
    assert not cgroups.oom_killed("unknown")


def test_version_1_makes_a_group_in_every_hierarchy(tmp_path: Path) -> None:
    v1 = {name: tmp_path / name for name in ("memory", "cpu", "pids", "freezer")}
    cgroups = Cgroups(root="pantala/n1", clock=ManualClock(), hierarchies=Hierarchies(v1=v1, unified=None))
    procs = cgroups.create("m1", LIMITS)
    assert procs == [tmp_path / name / "pantala/n1/m1/tasks" for name in v1]
    assert (tmp_path / "cpu/pantala/n1/m1/cpu.cfs_quota_us").read_text() == "80000"
    assert cgroups.list() == {"m1"}
    (tmp_path / "memory/pantala/n1/m1/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert cgroups.oom_killed("m1")


def test_processes_of_a_machine_are_those_of_any_hierarchy(tmp_path: Path) -> None:
    v1 = {name: tmp_path / name for name in ("memory", "pids")}
    cgroups = Cgroups(root="pantala/n1", clock=ManualClock(), hierarchies=Hierarchies(v1=v1, unified=None))
    cgroups.create("m1", LIMITS)
    (tmp_path / "memory/pantala/n1/m1/cgroup.procs").write_text("10\n11\n")
    (tmp_path / "pids/pantala/n1/m1/cgroup.procs").write_text("11\n12\n")
    assert cgroups.pids("m1") == {10, 11, 12}
    assert cgroups.pids("m2") == set()


def test_a_host_without_controllers_is_refused() -> None:
    with pytest.raises(Exception, match="no cgroup controller"):
        Cgroups(root="pantala/n1", clock=ManualClock(), hierarchies=Hierarchies(v1={}, unified=None))


def test_version_2_counts_memory_and_never_limits_below_what_is_held(tmp_path: Path) -> None:
    cgroups = unified(tmp_path)
    assert cgroups.memory("m1") is None
    cgroups.create("m1", LIMITS)
    machine, mib = tmp_path / "pantala/n1/m1", 1024 * 1024
    (machine / "memory.current").write_text(f"{100 * mib}\n")
    (machine / "memory.stat").write_text(f"anon {60 * mib}\ninactive_file {30 * mib}\n")
    memory = cgroups.memory("m1")
    assert memory is not None
    usage = memory.usage()
    assert usage is not None
    assert (usage.limit_mib, usage.used_mib) == (256, 70)
    memory.set_limit(128)
    assert (machine / "memory.max").read_text() == str((128 + 4) * mib)
    assert not (machine / "memory.reclaim").exists()
    with pytest.raises(DriverError, match="uses 70 MiB that it cannot give back, so 64 MiB are too few"):
        memory.set_limit(64)
    assert (machine / "memory.reclaim").read_text() == str((100 - 64 - 4) * mib)
    assert (machine / "memory.max").read_text() == str((128 + 4) * mib)
    assert memory.reclaim(16) == 0
    assert (machine / "memory.reclaim").read_text() == str(16 * mib)
