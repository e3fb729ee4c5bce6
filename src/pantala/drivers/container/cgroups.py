"""Control groups of machines, version 1 or 2, made and removed by us: what the kernel counted (was something killed for
memory?) stays readable until `remove`, and every process in the group is the machine's, whatever made it.

Layout: `<controller mount>/<root>/<machine id>`; version 2 has one mount for all controllers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path

import msgspec

from pantala.domain.burst import PERIOD_US, quota_us
from pantala.domain.runtime import CPUUsage, Limits
from pantala.drivers.container.freezer import Freezer
from pantala.drivers.container.memory import Memory
from pantala.errors import DriverError
from pantala.kit.clock import Clock

CONTROLLERS_V1 = ("memory", "cpu", "cpuacct", "pids", "freezer")
CONTROLLERS_V2 = ("memory", "cpu", "pids")
# Under contention machines get CPU as they were promised it: a shared CPU a sixteenth of a performance one.
SHARES_PER_CPU = {"shared": 64, "performance": 1024}
WEIGHT_PER_CPU = {"shared": 10, "performance": 160}
COUNTERS_V1 = {
    "memory_used": ("memory", "memory.usage_in_bytes"),
    "memory_limit": ("memory", "memory.limit_in_bytes"),
    "memory_stat": ("memory", "memory.stat"),
    "cpu": ("cpuacct", "cpuacct.stat"),
    "swap_used": ("memory", "memory.memsw.usage_in_bytes"),
    "swap_limit": ("memory", "memory.memsw.limit_in_bytes"),
}
COUNTERS_V2 = {
    "memory_used": ("", "memory.current"),
    "memory_limit": ("", "memory.max"),
    "memory_stat": ("", "memory.stat"),
    "cpu": ("", "cpu.stat"),
    "swap_used": ("", "memory.swap.current"),
    "swap_limit": ("", "memory.swap.max"),
}
MIB = 1024 * 1024
GONE_WITHIN_S = 10.0
# Memory of a machine that PID 1, the page tables and the kernel's own objects need beside the app.
OVERHEAD_MIB = 4


class Hierarchies(msgspec.Struct, frozen=True, kw_only=True):
    """Where controllers are mounted. `unified`: version 2 with controllers; otherwise `v1` by controller."""

    v1: dict[str, Path]
    unified: Path | None


def find_hierarchies(mountinfo: str) -> Hierarchies:
    """From the text of `/proc/self/mountinfo`."""
    v1: dict[str, Path] = {}
    unified: Path | None = None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mount_point = left.split()[4]
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup":
            for option in options.split(","):
                if option in CONTROLLERS_V1:
                    v1[option] = Path(mount_point)
        elif kind == "cgroup2":
            unified = Path(mount_point)
    if unified is not None:
        with contextlib.suppress(OSError):
            available = (unified / "cgroup.controllers").read_text().split()
            if set(CONTROLLERS_V2) <= set(available):
                return Hierarchies(v1={}, unified=unified)
    return Hierarchies(v1=v1, unified=None)


def settings_v1(limits: Limits) -> list[tuple[str, str, str]]:
    """(controller, file, value); swap is limited with memory where the kernel counts it."""
    memory_bytes = (limits.memory_mib + OVERHEAD_MIB) * MIB
    return [
        ("memory", "memory.limit_in_bytes", str(memory_bytes)),
        ("memory", "memory.memsw.limit_in_bytes", str(memory_bytes + limits.swap_mib * MIB)),
        ("cpu", "cpu.shares", str(limits.cpus * SHARES_PER_CPU[_kind(limits)])),
        ("cpu", "cpu.cfs_period_us", str(PERIOD_US)),
        ("cpu", "cpu.cfs_quota_us", str(quota_us(limits.cpus, throttled=False))),
        ("pids", "pids.max", str(limits.pids)),
    ]


def settings_v2(limits: Limits) -> list[tuple[str, str]]:
    """(file, value)."""
    return [
        ("memory.max", str((limits.memory_mib + OVERHEAD_MIB) * MIB)),
        ("memory.swap.max", str(limits.swap_mib * MIB)),
        ("memory.oom.group", "0"),
        ("cpu.weight", str(limits.cpus * WEIGHT_PER_CPU[_kind(limits)])),
        ("cpu.max", f"{quota_us(limits.cpus, throttled=False)} {PERIOD_US}"),
        ("pids.max", str(limits.pids)),
    ]


def _kind(limits: Limits) -> str:
    return "shared" if limits.shared_cpu else "performance"


_OPTIONAL = frozenset({"memory.memsw.limit_in_bytes", "memory.swap.max", "memory.oom.group"})


class Cgroups:
    """The groups below `root` (`pantala/<node>`)."""

    def __init__(self, *, root: str, clock: Clock, hierarchies: Hierarchies | None = None) -> None:
        self._clock = clock
        self._found = hierarchies or find_hierarchies(Path("/proc/self/mountinfo").read_text())
        if self._found.unified is not None:
            self._bases = {"unified": self._found.unified / root}
        else:
            self._bases = {name: mount / root for name, mount in self._found.v1.items()}
        self._root = root
        if not self._bases:
            raise DriverError("no cgroup controller is mounted on this host; machines could not be limited")

    @property
    def is_unified(self) -> bool:
        return self._found.unified is not None

    def create(self, machine_id: str, limits: Limits) -> list[Path]:
        """Groups with their limits; the files by which a process with one thread joins them."""
        if self._found.unified is not None:
            self._enable_controllers(self._found.unified)
        for base in self._bases.values():
            (base / machine_id).mkdir(parents=True, exist_ok=True)
        if self._found.unified is not None:
            folder = self._bases["unified"] / machine_id
            for name, value in settings_v2(limits):
                _write(folder / name, value)
        else:
            for controller, name, value in settings_v1(limits):
                if controller in self._bases:
                    _write(self._bases[controller] / machine_id / name, value)
        # Of version 1 `tasks`: a thread that moves itself waits for nobody, a whole process (`cgroup.procs`) waits
        # until all CPUs have passed through the scheduler, in each hierarchy anew.
        name = "cgroup.procs" if self.is_unified else "tasks"
        return [base / machine_id / name for base in self._bases.values()]

    def _enable_controllers(self, top: Path) -> None:
        folder = top
        for part in ("", *Path(self._root).parts):
            folder = folder / part
            folder.mkdir(exist_ok=True)
            _write(folder / "cgroup.subtree_control", " ".join(f"+{name}" for name in CONTROLLERS_V2))

    def pids(self, machine_id: str) -> set[int]:
        found: set[int] = set()
        for base in self._bases.values():
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in (base / machine_id / "cgroup.procs").read_text().split()}
        return found

    def threads(self, machine_id: str) -> set[int]:
        base = next(iter(self._bases.values()))
        try:
            return {int(tid) for tid in (base / machine_id / self._threads_file).read_text().split()}
        except OSError:
            return set()

    @property
    def _threads_file(self) -> str:
        return "cgroup.threads" if self.is_unified else "tasks"

    def counters(self, machine_id: str) -> dict[str, Path]:
        """Files of a machine's groups by what they count (`facts/counters.rs`); some hosts do not have all of them."""
        names = COUNTERS_V2 if self.is_unified else COUNTERS_V1
        found: dict[str, Path] = {}
        for counter, (controller, name) in names.items():
            base = self._bases.get("unified" if self.is_unified else controller, Path("/nonexistent"))
            found[counter] = base / machine_id / name
        return found

    def oom_killed(self, machine_id: str) -> bool:
        """Whether the kernel ever killed a process of the machine for memory. Readable until `remove`."""
        name = "memory.events" if self._found.unified is not None else "memory.oom_control"
        base = self._bases.get("unified", self._bases.get("memory"))
        if base is None:
            return False
        try:
            lines = (base / machine_id / name).read_text().splitlines()
        except OSError:
            return False
        return any(line.startswith("oom_kill ") and int(line.split()[1]) > 0 for line in lines)

    def cpu_usage(self, machine_id: str) -> CPUUsage | None:
        """What the kernel counted; None where the machine has no group. Another group (another start) is another
        `run`."""
        cpu = self._bases.get("unified", self._bases.get("cpu"))
        if cpu is None:
            return None
        try:
            run = str((cpu / machine_id).stat().st_ino)
            counted = _numbers((cpu / machine_id / "cpu.stat").read_text())
            if self._found.unified is not None:
                used_us, throttled_us = counted.get("usage_usec", 0), counted.get("throttled_usec", 0)
            else:
                acct = self._bases.get("cpuacct", cpu)
                used_us = int((acct / machine_id / "cpuacct.usage").read_text()) // 1000
                throttled_us = counted.get("throttled_time", 0) // 1000
        except OSError:
            return None
        return CPUUsage(run=run, used_us=used_us, throttled_us=throttled_us, periods=counted.get("nr_periods", 0))

    def set_cpu_quota(self, machine_id: str, quota: int) -> None:
        """So much CPU time in microseconds each period, over all CPUs. Nothing where the machine has no group."""
        if self._found.unified is not None:
            path, value = self._bases["unified"] / machine_id / "cpu.max", f"{quota} {PERIOD_US}"
        elif "cpu" in self._bases:
            path, value = self._bases["cpu"] / machine_id / "cpu.cfs_quota_us", str(quota)
        else:
            return
        if path.parent.is_dir():
            _write(path, value)

    def memory(self, machine_id: str) -> Memory | None:
        """None where the machine has no group."""
        base = self._bases.get("unified", self._bases.get("memory"))
        if base is None or not (base / machine_id).is_dir():
            return None
        return Memory(base / machine_id, unified=self.is_unified, overhead_mib=OVERHEAD_MIB)

    async def kill(self, machine_id: str) -> None:
        """SIGKILL until nobody is left. Raises DriverError (retry) when something does not die in time."""
        deadline = self._clock.monotonic() + GONE_WITHIN_S
        pause_s = 0.001
        while left := self.pids(machine_id):
            self._thaw(machine_id)
            for pid in left:
                self._kill_member(machine_id, pid)
            if self._clock.monotonic() > deadline:
                raise DriverError(f"processes {sorted(left)} of machine {machine_id} do not die", retry=True)
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)

    def _kill_member(self, machine_id: str, pid: int) -> None:
        """The number may have been given to another process since it was read: hold it, look again, then kill."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if pid in self.pids(machine_id):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)

    def freezer(self, machine_id: str) -> Freezer | None:
        """None on a host without a freezer."""
        base = self._bases.get("unified" if self.is_unified else "freezer")
        return Freezer(base / machine_id, unified=self.is_unified, clock=self._clock) if base is not None else None

    def _thaw(self, machine_id: str) -> None:
        if (freezer := self.freezer(machine_id)) is not None:
            with contextlib.suppress(DriverError):
                freezer.thaw()

    async def remove(self, machine_id: str) -> None:
        """Remove the emptied groups, with what the kernel counted in them."""
        deadline = self._clock.monotonic() + GONE_WITHIN_S
        for base in self._bases.values():
            while True:
                try:
                    _remove_tree(base / machine_id)
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY or self._clock.monotonic() > deadline:
                        raise DriverError(f"a cgroup of machine {machine_id} cannot be removed", retry=True) from error
                await self._clock.sleep(0.005)

    def exists(self, machine_id: str) -> bool:
        return any((base / machine_id).exists() for base in self._bases.values())

    def list(self) -> set[str]:
        """Machine ids that have a group."""
        found: set[str] = set()
        for base in self._bases.values():
            with contextlib.suppress(OSError):
                found |= {entry.name for entry in base.iterdir() if entry.is_dir()}
        return found

    def remove_root(self) -> None:
        """Remove the root itself where nothing is left in it; for tests and for leaving a host."""
        for base in self._bases.values():
            for folder in (base, *base.parents[: len(Path(self._root).parts) - 1]):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        if path.name in _OPTIONAL:
            return
        raise DriverError(f"the limit {path.name} = {value} was refused: {error.strerror}") from error


def _numbers(text: str) -> dict[str, int]:
    """A flat-keyed file of the kernel: a name and a number each line."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _remove_tree(folder: Path) -> None:
    """Deepest first: a machine may have made groups of its own. Files in a group are the kernel's."""
    try:
        children = [entry for entry in folder.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return
    for child in children:
        _remove_tree(child)
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()
