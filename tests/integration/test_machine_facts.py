"""What programs inside a machine are told of its CPUs and memory: its own, by whatever way they ask."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec
import pytest

from pantala.domain.runtime import ContainerRoot, UnpackedImage
from pantala.drivers.container import ContainerDriver, affinity
from pantala.drivers.container.cgroups import Cgroups
from pantala.kit.clock import SystemClock
from pantala.testing import driver_harness as h
from pantala.testing.poll import until
from pantala.wire.guest import Exec, GuestContainer, Start

pytestmark = [pytest.mark.anyio, pytest.mark.root]
HOST = sorted(os.sched_getaffinity(0))
MIB_KB = 1024


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[h.ContainerHarness]:
    with h.container_harness(tmp_path / "host") as made:
        yield made


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A layer with this Python and what it needs to begin, and two programs of the C library's own tools."""
    layer = tmp_path / "python"
    program = Path(sys.executable).resolve()
    library = Path(os.__file__).parent
    tools = [Path(tool) for tool in (shutil.which("nproc"), shutil.which("getconf")) if tool]
    for wanted in (program, *tools):
        linked = subprocess.run(["ldd", str(wanted)], capture_output=True, text=True, check=True).stdout
        libraries = [word for line in linked.splitlines() for word in line.split() if word.startswith("/")]
        for path in (str(wanted), *libraries):
            copy = layer / path.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    skipped = shutil.ignore_patterns(
        "site-packages", "test", "__pycache__", "lib-dynload", "idlelib", "tkinter", "ensurepip"
    )
    shutil.copytree(library, layer / str(library).lstrip("/"), ignore=skipped)
    return layer


class Machine:
    def __init__(self, driver: ContainerDriver, machine_id: str) -> None:
        self.driver, self.id = driver, machine_id

    async def run(self, *argv: str, container: str = "") -> str:
        done = await self.driver.exec(self.id, Exec(argv=list(argv), env={"PATH": "/bin"}, container=container))
        said = base64.b64decode(done.stdout_base64).decode()
        assert done.exit_code == 0, said + base64.b64decode(done.stderr_base64).decode()
        return said.strip()

    async def shell(self, script: str, *, container: str = "") -> str:
        return await self.run("sh", "-c", script, container=container)

    async def meminfo(self) -> dict[str, int]:
        lines = (await self.run("cat", "/proc/meminfo")).splitlines()
        return {name.rstrip(":"): int(value) for name, value, *_ in (line.split() for line in lines)}


async def start(
    harness: h.ContainerHarness,
    app: Start = h.RUNS,
    *,
    layer: Path | None = None,
    machine_id: str | None = None,
    cpus: int = 1,
    memory_mib: int = 256,
) -> Machine:
    driver, spec = harness.driver(), harness.spec(machine_id=machine_id, memory_mib=memory_mib)
    limits = msgspec.structs.replace(spec.limits, cpus=cpus)
    image = spec.image
    if layer is not None:
        image = UnpackedImage(digest="", layers=(*image.layers, layer), config=image.config)
    await driver.prepare(msgspec.structs.replace(spec, limits=limits, image=image))
    await driver.start(spec.machine_id, msgspec.structs.replace(app, cpus=HOST[-cpus:] if cpus < len(HOST) else []))
    return Machine(driver, spec.machine_id)


ASK_PYTHON = "import os; print(os.cpu_count(), len(os.sched_getaffinity(0)))"


@pytest.mark.parametrize("cpus", [1, len(HOST)])
async def test_programs_count_the_machines_cpus(harness: h.ContainerHarness, python: Path, cpus: int) -> None:
    machine = await start(harness, layer=python, cpus=cpus)
    assert await machine.run(str(Path(sys.executable).resolve()), "-I", "-S", "-c", ASK_PYTHON) == f"{cpus} {cpus}"
    assert await machine.run("/usr/bin/nproc") == str(cpus)
    assert await machine.run("/usr/bin/getconf", "_NPROCESSORS_ONLN") == str(cpus)
    assert await machine.shell("nproc; grep -c ^processor /proc/cpuinfo; grep -c '^cpu[0-9]' /proc/stat") == "\n".join(
        [str(cpus)] * 3
    )


async def test_more_cpus_than_the_host_has_are_shown_as_those_of_the_host(harness: h.ContainerHarness) -> None:
    machine = await start(harness, cpus=len(HOST) + 2)
    script = (
        "nproc; grep -c ^processor /proc/cpuinfo; grep -c '^cpu[0-9]' /proc/stat; cat /sys/devices/system/cpu/online"
    )
    online = f"0-{len(HOST) - 1}" if len(HOST) > 1 else "0"
    assert (await machine.shell(script)).split() == [str(len(HOST))] * 3 + [online]


async def test_memory_is_the_machines_and_what_it_uses_shows_at_once(harness: h.ContainerHarness) -> None:
    machine = await start(harness, memory_mib=256)
    before = await machine.meminfo()
    assert before["MemTotal"] == 256 * MIB_KB
    assert before["SwapTotal"] == 0
    assert 200 * MIB_KB < before["MemAvailable"] <= before["MemTotal"]
    await machine.shell("dd if=/dev/zero of=/dev/shm/held bs=1M count=60 2>/dev/null")
    held = await machine.meminfo()
    assert held["Shmem"] - before["Shmem"] == pytest.approx(60 * MIB_KB, rel=0.05)
    assert before["MemAvailable"] - held["MemAvailable"] == pytest.approx(60 * MIB_KB, rel=0.2)
    assert (await machine.run("cat", "/proc/swaps")).splitlines()[1:] == []


async def test_a_size_that_changes_shows_with_the_next_start_and_a_changed_limit_at_once(
    harness: h.ContainerHarness,
) -> None:
    machine = await start(harness, cpus=len(HOST), memory_mib=512)
    assert (await machine.meminfo())["MemTotal"] == 512 * MIB_KB
    await machine.driver.set_memory_limit(machine.id, 128)
    assert (await machine.meminfo())["MemTotal"] == 128 * MIB_KB
    await machine.driver.destroy(machine.id)
    machine = await start(harness, machine_id=machine.id, cpus=1, memory_mib=256)
    assert (await machine.meminfo())["MemTotal"] == 256 * MIB_KB
    assert await machine.run("nproc") == "1"


async def test_it_is_told_the_same_after_it_was_suspended(harness: h.ContainerHarness) -> None:
    """While something inside reads all the time: whoever waits for PID 1 must not keep the machine from freezing."""
    app = h.shell("while :; do cat /proc/meminfo /proc/stat >/dev/null; done")
    machine = await start(harness, app)
    for _ in range(5):
        await machine.driver.suspend(machine.id)
        await machine.driver.resume(machine.id)
    assert (await machine.meminfo())["MemTotal"] == 256 * MIB_KB
    assert await machine.run("nproc") == "1"
    runtime = await machine.driver.inspect(machine.id)
    assert runtime is not None
    assert runtime.phase == "running"


async def test_time_used_shows_as_it_passes(harness: h.ContainerHarness) -> None:
    machine = await start(harness)

    async def used() -> int:
        fields = (await machine.run("head", "-n1", "/proc/stat")).split()
        return int(fields[1]) + int(fields[3])

    before = await used()
    await machine.shell("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    await until(used, lambda now: now > before, within_s=10)


async def test_containers_of_a_machine_are_told_the_same(harness: h.ContainerHarness) -> None:
    driver, spec = harness.driver(), harness.spec(memory_mib=256)
    roots = (ContainerRoot(name="web", layers=spec.image.layers),)
    await driver.prepare(msgspec.structs.replace(spec, containers=roots))
    web = GuestContainer(name="web", root="/.pantala/containers/web", argv=["sleep", "1000"], env={"PATH": "/bin"})
    await driver.start(spec.machine_id, Start(argv=[], env={}, containers=[web], cpus=HOST[:1]))
    machine = Machine(driver, spec.machine_id)
    script = "nproc; head -n1 /proc/meminfo; cat /sys/devices/system/cpu/online"
    assert (await machine.shell(script, container="web")).split() == ["1", "MemTotal:", str(256 * MIB_KB), "kB", "0"]


async def test_what_it_is_told_cannot_be_changed_inside(harness: h.ContainerHarness) -> None:
    machine = await start(harness)
    for path in ("/proc/meminfo", "/proc/stat", "/proc/cpuinfo", "/sys/devices/system/cpu/online"):
        assert await machine.shell(f"(echo 1 > {path}) 2>&1 || umount {path} 2>&1 || echo kept") != ""
    assert (await machine.meminfo())["MemTotal"] == 256 * MIB_KB


async def test_readers_who_never_finish_take_no_place_from_others(harness: h.ContainerHarness) -> None:
    script = "i=0; while [ $i -lt 100 ]; do sh -c 'exec 3</proc/meminfo; read -n1 a <&3; sleep 1000' & i=$((i+1)); done"
    driver, spec = harness.driver(), harness.spec(memory_mib=256)
    limits = msgspec.structs.replace(spec.limits, pids=512)
    await driver.prepare(msgspec.structs.replace(spec, limits=limits))
    await driver.start(spec.machine_id, h.shell(f"{script}; echo begun; wait"))
    machine = Machine(driver, spec.machine_id)
    await until(lambda: driver.logs(spec.machine_id, 0), lambda lines: len(lines) > 0, within_s=30)
    assert (await machine.meminfo())["MemTotal"] == 256 * MIB_KB


async def test_a_file_that_is_copied_while_others_look_at_it_ends_where_it_ends(harness: h.ContainerHarness) -> None:
    machine = await start(harness, h.shell("for i in 1 2 3 4; do while :; do [ -s /proc/meminfo ]; done & done; wait"))
    copies = "i=0; while [ $i -lt 300 ]; do cat /proc/meminfo; i=$((i+1)); done"
    seen = await machine.shell(f"({copies}) | tr '\\000' '#' | grep -c '#' || true")
    assert seen == "0"


async def test_a_machine_moves_to_another_cpu_with_all_that_it_has_begun(harness: h.ContainerHarness) -> None:
    machine = await start(harness, h.shell("sleep 1000 & sleep 1000 & echo begun; wait"))
    await until(lambda: machine.driver.logs(machine.id, 0), bool, within_s=20)
    old, new = frozenset({HOST[-1]}), frozenset({HOST[0]})
    assert machine.driver.cpus(machine.id) == old
    machine.driver.move_cpus(machine.id, old, new)
    threads = Cgroups(root=harness.cgroup_root, clock=SystemClock()).threads(machine.id)
    assert len(threads) >= 3
    assert {affinity.cpus_of(tid) for tid in threads} == {new}
    assert await machine.run("nproc") == "1"


async def test_a_killed_init_leaves_nobody_waiting(harness: h.ContainerHarness) -> None:
    machine = await start(harness, h.shell("while :; do cat /proc/meminfo >/dev/null; done"))
    runtime = await machine.driver.inspect(machine.id)
    assert runtime is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(runtime.pid, h.KILL)
    with anyio.fail_after(20):
        await machine.driver.wait(machine.id)
        await machine.driver.destroy(machine.id)
    assert harness.leftovers(machine.id) == []


async def test_its_age_is_the_machines_and_start_times_of_processes_go_with_it(harness: h.ContainerHarness) -> None:
    host_s = float(Path("/proc/uptime").read_text().split()[0])
    machine = await start(harness, cpus=1)
    script = "cat /proc/uptime; cut -d' ' -f22 /proc/self/stat; grep btime /proc/stat; date +%s; cat /proc/uptime"
    first, ticks, btime, now, second = (await machine.shell(script)).splitlines()
    (age_s, idle_s), later_s = (float(word) for word in first.split()), float(second.split()[0])
    assert 0 <= age_s <= later_s < host_s
    assert 0 <= idle_s <= age_s
    assert 0 <= int(ticks) / os.sysconf("SC_CLK_TCK") <= later_s + 0.02
    assert abs(int(btime.split()[1]) + later_s - int(now)) <= 2
    assert len(first.strip()) < 40


async def test_its_load_counts_its_own_tasks(harness: h.ContainerHarness) -> None:
    machine = await start(harness, h.shell("sleep 1000 & sleep 1000 & while :; do :; done"))

    async def load() -> list[str]:
        return (await machine.run("cat", "/proc/loadavg")).split()

    # PID 1, the shell and what it began, and whoever asks; the shell runs, and so does who asks.
    seen = await until(load, lambda words: words[3] == "2/5", within_s=20.0)
    assert seen[:3] == ["0.00"] * 3
    assert 4 <= int(seen[4]) < 1000


async def test_what_it_is_told_of_its_age_is_the_same_in_a_container(harness: h.ContainerHarness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(
        msgspec.structs.replace(spec, containers=(ContainerRoot(name="one", layers=spec.image.layers),))
    )
    crew = [GuestContainer(name="one", root="/.pantala/containers/one", argv=["sleep", "1000"], env={"PATH": "/bin"})]
    await driver.start(spec.machine_id, Start(argv=[], env={}, containers=crew))
    machine = Machine(driver, spec.machine_id)
    host_s = float(Path("/proc/uptime").read_text().split()[0])
    assert float((await machine.shell("cat /proc/uptime", container="one")).split()[0]) < host_s
    assert (await machine.shell("cat /proc/loadavg", container="one")).startswith("0.00 0.00 0.00 ")
