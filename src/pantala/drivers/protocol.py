"""The Driver Protocol and its semantics; `tests/contract/test_drivers.py` holds every driver to them.

A machine's runtime goes through `prepare` (PID 1 is there, network and mounts in place, no process of the app) and
`start` (one message). All operations are idempotent by `machine_id` and safe to repeat after the caller died: resources
are named by the machine's id, and `destroy` removes whatever is left, whoever made it. Nothing that a running machine
needs lives in the caller, so a killed agent leaves machines running and `inspect` finds them again.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from pantala.domain.runtime import (
    ContainerRoot,
    CPUUsage,
    Limits,
    MemoryUsage,
    NetworkHandle,
    ProcessInfo,
    RootKept,
    UnpackedImage,
    VolumeRoot,
)
from pantala.wire.guest import ContainerState, Exec, Executed, ExitRecord, Start
from pantala.wire.machine import Isolation

Phase = Literal["prepared", "running", "suspended", "exited"]


class PrepareSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything PID 1 needs but the app's secrets. `uid_base`: 65,536 ids from there are the machine's.

    `hosts` and `resolv_conf` are the texts of the two files inside the machine. With `containers` those run, each in a
    root of its own at `domain.containers.ROOTS`, and `image` is only what PID 1 stands in.
    `root_kept`: what `clear` leaves of it for a later `prepare`, and whether this one goes on with what an earlier one
    left: with `restart` if it was of the same instance, with `always` in any case, else it begins with the image.
    """

    machine_id: str
    instance_id: str
    image: UnpackedImage
    network: NetworkHandle
    limits: Limits
    uid_base: int
    hostname: str
    hosts: str
    resolv_conf: str
    containers: tuple[ContainerRoot, ...] = ()
    volumes: tuple[VolumeRoot, ...] = ()
    root_kept: RootKept = "never"


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """What a driver knows of one machine. `prepared`, `running` and `suspended` have a live PID 1; a suspended one gets
    no CPU until `resume`, also after the caller was replaced.

    `exited` keeps its `exit` record until `destroy`. `oom_killed`: the kernel killed something of it for memory.
    """

    machine_id: str
    instance_id: str
    phase: Phase
    pid: int
    exit: ExitRecord | None = None
    oom_killed: bool = False


class LogRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`position` continues reading after this record."""

    timestamp_ns: int
    stream: Literal["stdout", "stderr"]
    text: str
    position: int


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the driver can run machines here, and what was tried, for `pantala doctor`."""

    ok: bool
    detail: str
    took_ms: int


def not_isolated(driver: str) -> Isolation:
    """Of a driver that runs nothing for real."""
    return Isolation(
        driver=driver,
        boundary="none",
        kernel="",
        seccomp="",
        capabilities=[],
        user_mapping="",
        no_new_privileges=False,
    )


class Driver(Protocol):
    name: str
    isolation: Literal["vm", "container", "none"]

    def isolated(self, uid_base: int) -> Isolation:
        """What keeps a machine with these ids apart, as this driver makes it now."""
        ...

    async def probe(self) -> Probe:
        """Boot something small for real."""
        ...

    async def prepare(self, spec: PrepareSpec) -> Runtime:
        """Bring PID 1 up, blocked. Raises DriverError. A prepared machine of the same instance is returned as it is."""
        ...

    async def start(self, machine_id: str, start: Start) -> int:
        """Run the app in a prepared machine; the pid inside.

        Raises DriverError, with guest_fault when its command cannot run.
        """
        ...

    async def stop(self, machine_id: str, *, signal: int, grace_s: float) -> None:
        """Ask the app to end; it is killed after `grace_s` even if the caller dies. Returns at once; see `wait`.
        A suspended machine goes on for it."""
        ...

    async def signal(self, machine_id: str, signal: int) -> None: ...

    async def suspend(self, machine_id: str) -> None:
        """Nothing of a running machine runs when this returns; memory, sockets and open files stay. Repeating it is
        fine. Raises DriverError when it does not run, or cannot be suspended: it then goes on."""
        ...

    async def resume(self, machine_id: str) -> None:
        """A suspended machine goes on where it was; one that runs is left alone. Raises DriverError when nothing of
        it is there."""
        ...

    async def wait(self, machine_id: str) -> Runtime:
        """Return when PID 1 is gone, however it went, with the exit record if one was written."""
        ...

    async def inspect(self, machine_id: str) -> Runtime | None:
        """What is there now, also after the caller was replaced; None if nothing is."""
        ...

    async def exec(self, machine_id: str, command: Exec) -> Executed:
        """Run a command beside the app until it ends or its time is over.

        Raises DriverError, with guest_fault when it cannot run, and when the machine ends before it.
        """
        ...

    def calls(self, machine_id: str) -> AsyncGenerator[socket.socket]:
        """Connections to `/.fly/api` of a machine that runs, each from one of its processes; ends when PID 1 does."""
        ...

    async def containers(self, machine_id: str) -> list[ContainerState]:
        """How the containers of a running machine are; empty where it has none. Raises DriverError."""
        ...

    async def processes(self, machine_id: str) -> list[ProcessInfo]:
        """What lives in the machine, PID 1 first; empty where nothing runs."""
        ...

    def cpu_usage(self, machine_id: str) -> CPUUsage | None:
        """What the machine used since it was prepared; None where there is none. Cheap: it is read every second."""
        ...

    def set_cpu_quota(self, machine_id: str, quota_us: int) -> None:
        """CPU time for each period of `domain.burst`, over all its CPUs; at first it has all of them. Nothing where
        the machine is not."""
        ...

    def cpus(self, machine_id: str) -> frozenset[int] | None:
        """On which of the host's CPUs PID 1 runs, and all that it begins from now on; None where there is none."""
        ...

    def move_cpus(self, machine_id: str, old: frozenset[int], new: frozenset[int]) -> None:
        """What runs on exactly `old` goes on on `new`. Nothing where the machine is not."""
        ...

    async def memory(self, machine_id: str) -> MemoryUsage | None:
        """None where there is none."""
        ...

    async def set_memory_limit(self, machine_id: str, limit_mib: int) -> None:
        """Until the machine is prepared again. Raises DriverError, with guest_fault when the machine holds more and
        cannot give it back; nothing of it is killed for that."""
        ...

    async def reclaim_memory(self, machine_id: str, amount_mib: int) -> int:
        """Have it give back memory that it does not need now; how many MiB it did. Raises DriverError."""
        ...

    async def destroy(self, machine_id: str) -> None:
        """Kill and remove everything named by this id; also what a crashed `prepare` left, and a root that was kept."""
        ...

    async def clear(self, machine_id: str) -> None:
        """As `destroy`, but the root stays if it was prepared to be kept."""
        ...

    async def list(self) -> list[str]:
        """Ids that own anything: processes, directories, mounts, cgroups, roots that are kept."""
        ...

    async def logs(self, machine_id: str, position: int) -> list[LogRecord]:
        """Whole lines since `position` (0: the oldest kept), at most 1,000. Readable until `destroy`."""
        ...

    def ring_path(self, machine_id: str) -> Path | None:
        """The ring file, so that a reader can watch it; None where there is none."""
        ...
