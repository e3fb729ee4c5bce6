"""The `container` driver: machines as hardened containers, started by crun (else runc), owned by nobody but the kernel.

How a machine is made, and why nothing of it can leak, is in this package's README. The agent calls this class;
everything it knows of a machine it reads back from the machine's folders, cgroup and PID 1.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal as signals
import socket
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
import msgspec

from pantala.domain.runtime import (
    ContainerRoot,
    CPUUsage,
    ImageConfig,
    Limits,
    MemoryUsage,
    ProcessInfo,
    RootKept,
    UnpackedImage,
    VolumeRoot,
)
from pantala.drivers import guest, ring
from pantala.drivers.container import affinity, facts, processes
from pantala.drivers.container import spec as oci
from pantala.drivers.container.cgroups import OVERHEAD_MIB, Cgroups
from pantala.drivers.container.disk import DiskTemplates, grow
from pantala.drivers.container.isolation import describe, digest_of, version_of
from pantala.drivers.container.layout import MachineFile, MachineFolder, PidFile, open_pidfd
from pantala.drivers.container.loops import loop_file, loop_files
from pantala.drivers.container.memory import Memory
from pantala.drivers.protocol import LogRecord, Phase, PrepareSpec, Probe, Runtime
from pantala.errors import DriverError, PantalaError
from pantala.kit.clock import Clock, SystemClock
from pantala.kit.disk import disk_full, is_full
from pantala.wire.guest import (
    ContainerState,
    Exec,
    Executed,
    Failed,
    GuestReply,
    GuestRequest,
    Ok,
    Refused,
    Signal,
    Start,
    Started,
    Status,
    StatusReply,
    Stop,
)
from pantala.wire.machine import Isolation

RING_BYTES = 512 * 1024
HELPER_DEADLINE_S = 30.0
LOOP_GONE_WITHIN_S = 10.0
PROBE_DEADLINE_S = 20.0
STDERR_SHOWN = 600


class _Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """`PrepareSpec` with what `probe` leaves out: a machine without a network."""

    machine_id: str
    instance_id: str
    layers: tuple[Path, ...]
    netns: Path | None
    userns: Path | None
    limits: Limits
    uid_base: int
    hostname: str
    hosts: str
    resolv_conf: str
    containers: tuple[ContainerRoot, ...] = ()
    volumes: tuple[VolumeRoot, ...] = ()
    root_kept: RootKept = "never"

    def goes_on_with(self, kept: MachineFile) -> bool:
        return self.root_kept == "always" or (self.root_kept == "restart" and kept.instance_id == self.instance_id)


class ContainerDriver:
    """`init` is the host's `pantala-init`; `runtime` the path of crun or runc, found on PATH if it is not given."""

    name = "container"
    isolation: Literal["vm", "container", "none"] = "container"

    def __init__(
        self,
        *,
        state_dir: Path,
        run_dir: Path,
        cgroup_root: str,
        init: Path,
        clock: Clock | None = None,
        runtime: Path | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._run_dir = run_dir
        self._init = init
        self._clock = clock or SystemClock()
        self._runtime = runtime
        self._cgroup_root = cgroup_root
        self._templates = DiskTemplates(state_dir / "templates")

    @functools.cached_property
    def _cgroups(self) -> Cgroups:
        return Cgroups(root=self._cgroup_root, clock=self._clock)

    def _folder(self, machine_id: str) -> MachineFolder:
        return MachineFolder(state_dir=self._state_dir, run_dir=self._run_dir, machine_id=machine_id)

    def isolated(self, uid_base: int) -> Isolation:
        try:
            runtime = version_of(self._find_runtime())
        except DriverError:
            runtime = ""
        return describe(uid_base, runtime=runtime, init=digest_of(self._init))

    # --- bringing up -----------------------------------------------------------------------------------------------

    async def prepare(self, spec: PrepareSpec) -> Runtime:
        """Leaves PID 1 blocked. What an earlier attempt or an ended run of the same id left is removed first."""
        attempt = _Attempt(
            machine_id=spec.machine_id,
            instance_id=spec.instance_id,
            layers=spec.image.layers,
            netns=spec.network.netns,
            userns=spec.network.userns,
            limits=spec.limits,
            uid_base=spec.uid_base,
            hostname=spec.hostname,
            hosts=spec.hosts,
            resolv_conf=spec.resolv_conf,
            containers=spec.containers,
            volumes=spec.volumes,
            root_kept=spec.root_kept,
        )
        return await self._prepare(attempt)

    async def _prepare(self, attempt: _Attempt) -> Runtime:
        machine_id = attempt.machine_id
        found = await self.inspect(machine_id)
        if found is not None and found.phase != "exited":
            if found.instance_id == attempt.instance_id:
                return found
            raise DriverError(f"machine {machine_id} still runs instance {found.instance_id}; destroy that first")
        if not attempt.layers:
            raise DriverError("the image has no layers", guest_fault=True)
        await self.clear(machine_id)

        folder = self._folder(machine_id)
        kept = folder.kept()
        if kept is not None and not attempt.goes_on_with(kept):
            await anyio.to_thread.run_sync(folder.remove)
            kept = None
        token = secrets.token_hex(8)
        machine = MachineFile(
            machine_id=machine_id,
            instance_id=attempt.instance_id,
            uid_base=attempt.uid_base,
            keeps_root=attempt.root_kept != "never",
        )
        try:
            folder.create(machine, token)
            ring.create(folder.ring, RING_BYTES)
        except OSError as error:
            if is_full(error, folder.state):
                raise disk_full(f"the files of machine {machine_id}", folder.state) from error
            raise DriverError(f"the machine's files cannot be made: {error.strerror}") from error
        if kept is None:
            await self._templates.copy_to(folder.disk, attempt.limits.disk_mib, lasting=machine.keeps_root)
        else:
            await grow(folder.disk, attempt.limits.disk_mib, self._clock)
        for index, volume in enumerate(attempt.volumes):
            if volume.disk_mib is not None:
                await self._templates.copy_to(folder.volume_disk(index), volume.disk_mib)
        procs = self._cgroups.create(machine_id, attempt.limits)
        await self._enclose(self._plan(attempt, folder, token, procs))
        runtime = await self.inspect(machine_id)
        if runtime is None or runtime.phase == "exited":
            raise DriverError(f"init of machine {machine_id} ended at once: {_tail(folder.console)}")
        return runtime

    def _plan(self, attempt: _Attempt, folder: MachineFolder, token: str, procs: list[Path]) -> dict[str, Any]:
        runtime = self._find_runtime()
        config = oci.build(
            machine_id=attempt.machine_id,
            hostname=attempt.hostname,
            uid_base=attempt.uid_base,
            joins_netns=attempt.netns is not None,
            joins_userns=attempt.userns is not None,
            cgroup_mount=self._cgroups.is_unified,
            containers=attempt.containers,
        )
        return {
            "machine_id": attempt.machine_id,
            "attempt": token,
            "run": str(folder.run),
            "ring": str(folder.ring),
            "exit_record": str(folder.exit_record),
            "cgroups": [str(path) for path in procs],
            "uid_base": attempt.uid_base,
            "netns": attempt.netns and str(attempt.netns),
            "userns": attempt.userns and str(attempt.userns),
            "layers": [str(layer) for layer in attempt.layers],
            "disk": str(folder.disk),
            "keeps_root": attempt.root_kept != "never",
            "init": str(self._init),
            "runtime": runtime_command(runtime),
            "enclosure": oci.ENCLOSURE,
            # crun 1.8 refuses a tree of both versions; our cgroups are made here, it needs none.
            "detach": [] if self._cgroups.is_unified else ["/sys/fs/cgroup/unified"],
            "config": config,
            "files": [
                ("hosts", attempt.hosts),
                ("resolv.conf", attempt.resolv_conf),
                ("hostname", f"{attempt.hostname}\n"),
                *facts.files(attempt.limits),
            ],
            "facts": facts.plan(
                attempt.limits,
                counters=self._cgroups.counters(attempt.machine_id),
                unified=self._cgroups.is_unified,
                beside_mib=OVERHEAD_MIB,
            ),
            "containers": [
                {"name": one.name, "layers": [str(layer) for layer in one.layers]} for one in attempt.containers
            ],
            "volumes": [
                {
                    "name": one.name,
                    "memory_mib": one.memory_mib,
                    "disk": None if one.disk_mib is None else str(folder.volume_disk(index)),
                    "layers": [str(layer) for layer in one.layers],
                }
                for index, one in enumerate(attempt.volumes)
            ],
        }

    async def _enclose(self, plan: dict[str, Any]) -> None:
        try:
            with anyio.fail_after(HELPER_DEADLINE_S):
                done = await anyio.run_process(
                    [str(self._init), "enclose"],
                    input=msgspec.json.encode(plan),
                    stdout=subprocess.DEVNULL,
                    check=False,
                    start_new_session=True,
                )
        except TimeoutError as error:
            raise DriverError(f"the container did not come up within {HELPER_DEADLINE_S:g} s", retry=True) from error
        except OSError as error:
            raise DriverError(f"{self._init} cannot be run: {error.strerror}") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or f"the helper ended with {done.returncode}"
            raise DriverError(f"the container could not be made: {said[-STDERR_SHOWN:]}")

    def _find_runtime(self) -> Path:
        if self._runtime is not None:
            return self._runtime
        for name in ("crun", "runc"):
            if path := shutil.which(name):
                return Path(path)
        raise DriverError("neither crun nor runc is installed; install the Debian package crun")

    async def start(self, machine_id: str, start: Start) -> int:
        match await self._call(machine_id, start):
            case Started(pid=pid):
                return pid
            case Failed(reason=reason):
                raise DriverError(reason, guest_fault=True)
            case Refused(reason=reason):
                # Started by a caller that died before it heard the answer.
                status = await self._call(machine_id, Status())
                if isinstance(status, StatusReply) and status.pid:
                    return status.pid
                raise DriverError(reason)
            case reply:
                raise DriverError(f"init answered a start with {type(reply).__name__}")

    # --- a running machine -----------------------------------------------------------------------------------------

    async def stop(self, machine_id: str, *, signal: int, grace_s: float) -> None:
        if self._is_frozen(machine_id):
            self._thaw(machine_id)
        try:
            await self._call(machine_id, Stop(signal=signal, grace_ms=max(0, round(grace_s * 1000))))
        except guest.GuestGone:
            if await self._is_alive(machine_id):
                raise

    async def signal(self, machine_id: str, signal: int) -> None:
        if self._is_frozen(machine_id):
            raise DriverError(f"machine {machine_id} is suspended")
        await self._call(machine_id, Signal(signal=signal))

    async def exec(self, machine_id: str, command: Exec) -> Executed:
        if self._is_frozen(machine_id):
            raise DriverError(f"machine {machine_id} is suspended")
        match await self._call(machine_id, command, deadline_s=command.timeout_ms / 1000 + guest.CALL_DEADLINE_S):
            case Executed() as ended:
                return ended
            case Failed(reason=reason):
                raise DriverError(reason, guest_fault=True)
            case reply:
                raise DriverError(f"init answered a command with {type(reply).__name__}")

    async def suspend(self, machine_id: str) -> None:
        runtime = await self.inspect(machine_id)
        if runtime is None or runtime.phase in ("prepared", "exited"):
            raise DriverError(f"machine {machine_id} does not run")
        freezer = self._cgroups.freezer(machine_id)
        if freezer is None:
            raise DriverError("this host has no freezer; mount the cgroup controller freezer")
        await freezer.freeze()

    async def resume(self, machine_id: str) -> None:
        """Nothing is awaited: a request waits for this."""
        recorded = self._folder(machine_id).read_pid()
        pidfd = open_pidfd(recorded) if recorded else None
        if pidfd is None:
            raise DriverError(f"what ran in machine {machine_id} is gone")
        os.close(pidfd)
        self._thaw(machine_id)

    def _is_frozen(self, machine_id: str) -> bool:
        freezer = self._cgroups.freezer(machine_id)
        return freezer is not None and freezer.is_asked()

    def _thaw(self, machine_id: str) -> None:
        if (freezer := self._cgroups.freezer(machine_id)) is not None:
            freezer.thaw()

    async def containers(self, machine_id: str) -> list[ContainerState]:
        match await self._call(machine_id, Status()):
            case StatusReply(containers=states):
                return states
            case reply:
                raise DriverError(f"init answered a question with {type(reply).__name__}")

    async def _call(
        self, machine_id: str, request: GuestRequest, *, deadline_s: float = guest.CALL_DEADLINE_S
    ) -> GuestReply:
        folder = self._folder(machine_id)
        if not folder.socket.exists():
            raise guest.GuestGone(f"machine {machine_id} is not prepared")
        reply = await guest.call(folder.socket, request, deadline_s=deadline_s)
        if isinstance(reply, Refused) and not isinstance(request, Start):
            raise DriverError(reply.reason)
        if isinstance(request, Stop | Signal) and not isinstance(reply, Ok):
            raise DriverError(f"init answered with {type(reply).__name__}")
        return reply

    async def wait(self, machine_id: str) -> Runtime:
        recorded = self._folder(machine_id).read_pid()
        pidfd = open_pidfd(recorded) if recorded else None
        if pidfd is not None:
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        runtime = await self.inspect(machine_id)
        if runtime is None:
            raise DriverError(f"there is no machine {machine_id}")
        return runtime

    async def inspect(self, machine_id: str) -> Runtime | None:
        folder = self._folder(machine_id)
        machine, recorded = folder.read_machine(), folder.read_pid()
        if machine is None or recorded is None:
            return None
        phase = await self._phase(folder, recorded, machine_id)
        return Runtime(
            machine_id=machine_id,
            instance_id=machine.instance_id,
            phase=phase,
            pid=recorded.pid,
            exit=folder.read_exit() if phase == "exited" else None,
            oom_killed=self._cgroups.oom_killed(machine_id),
        )

    async def _phase(self, folder: MachineFolder, recorded: PidFile, machine_id: str) -> Phase:
        pidfd = open_pidfd(recorded)
        if pidfd is None:
            return "exited"
        try:
            if self._is_frozen(machine_id):
                return "suspended"
            with anyio.move_on_after(guest.CALL_DEADLINE_S) as scope:
                try:
                    reply = await guest.call(folder.socket, Status())
                    is_prepared = isinstance(reply, StatusReply) and reply.phase == "prepared"
                except guest.GuestGone:
                    # It does not listen any more, so it is on its way out, unless its socket was taken from it.
                    await anyio.wait_readable(pidfd)
                    return "exited"
                except DriverError:
                    is_prepared = False  # alive without answering, such as a frozen machine
                return "prepared" if is_prepared else "running"
            if scope.cancelled_caught:
                return "running"
        finally:
            os.close(pidfd)
        return "running"

    async def _is_alive(self, machine_id: str) -> bool:
        runtime = await self.inspect(machine_id)
        return runtime is not None and runtime.phase != "exited"

    def cpu_usage(self, machine_id: str) -> CPUUsage | None:
        return self._cgroups.cpu_usage(machine_id)

    def set_cpu_quota(self, machine_id: str, quota_us: int) -> None:
        self._cgroups.set_cpu_quota(machine_id, quota_us)

    def cpus(self, machine_id: str) -> frozenset[int] | None:
        recorded = self._folder(machine_id).read_pid()
        return affinity.cpus_of(recorded.pid) if recorded is not None else None

    def move_cpus(self, machine_id: str, old: frozenset[int], new: frozenset[int]) -> None:
        affinity.move(lambda: self._cgroups.threads(machine_id), old, new)

    async def memory(self, machine_id: str) -> MemoryUsage | None:
        group = self._cgroups.memory(machine_id)
        return group.usage() if group is not None else None

    async def set_memory_limit(self, machine_id: str, limit_mib: int) -> None:
        # In a thread: the kernel writes back and drops pages before it answers.
        await anyio.to_thread.run_sync(self._memory(machine_id).set_limit, limit_mib)

    async def reclaim_memory(self, machine_id: str, amount_mib: int) -> int:
        return await anyio.to_thread.run_sync(self._memory(machine_id).reclaim, amount_mib)

    def _memory(self, machine_id: str) -> Memory:
        group = self._cgroups.memory(machine_id)
        if group is None:
            raise DriverError(f"nothing of machine {machine_id} is there")
        return group

    # --- the end ---------------------------------------------------------------------------------------------------

    async def destroy(self, machine_id: str) -> None:
        folder = self._folder(machine_id)
        if await self._end(machine_id, folder):
            await anyio.to_thread.run_sync(folder.remove)

    async def clear(self, machine_id: str) -> None:
        folder = self._folder(machine_id)
        if await self._end(machine_id, folder):
            await anyio.to_thread.run_sync(folder.clear)

    async def _end(self, machine_id: str, folder: MachineFolder) -> bool:
        """Processes, then what they held (mounts and loop device go with them), then groups; files are left. False
        where there is nothing."""
        if not folder.exists() and not self._cgroups.exists(machine_id):
            return False
        recorded = folder.read_pid()
        if recorded and (pidfd := open_pidfd(recorded)) is not None:
            try:
                with contextlib.suppress(ProcessLookupError):
                    signals.pidfd_send_signal(pidfd, signals.SIGKILL)
            finally:
                os.close(pidfd)
        await self._cgroups.kill(machine_id)
        await self._loops_gone(folder)
        await self._cgroups.remove(machine_id)
        return True

    async def _loops_gone(self, folder: MachineFolder) -> None:
        """The kernel frees loop devices a moment after the last process of the machine ended."""
        disks, names = folder.disks(), folder.read_loops()
        deadline = self._clock.monotonic() + LOOP_GONE_WITHIN_S
        pause_s = 0.001
        while disks and (used := disks & (loop_files() if names is None else {loop_file(name) for name in names})):
            if self._clock.monotonic() > deadline:
                raise DriverError(f"a loop device of {', '.join(sorted(used))} is still in use", retry=True)
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.02)

    async def calls(self, machine_id: str) -> AsyncGenerator[socket.socket]:
        async for call in guest.take_calls(self._folder(machine_id).socket):
            yield call

    async def processes(self, machine_id: str) -> list[ProcessInfo]:
        return await anyio.to_thread.run_sync(processes.read, self._cgroups.pids(machine_id))

    async def list(self) -> list[str]:
        found = self._cgroups.list()
        for base in (self._state_dir, self._run_dir):
            with contextlib.suppress(OSError):
                found |= {entry.name for entry in (base / "machines").iterdir()}
        machines = str(self._state_dir / "machines") + "/"
        found |= {path.removeprefix(machines).partition("/")[0] for path in loop_files() if path.startswith(machines)}
        return sorted(found)

    # --- output ----------------------------------------------------------------------------------------------------

    async def logs(self, machine_id: str, position: int) -> list[LogRecord]:
        """A gap (output overwritten before it was read) is a record of its own."""
        part = ring.read(self._folder(machine_id).ring, position)
        records = [
            LogRecord(
                timestamp_ns=record.timestamp_ns,
                stream=record.stream,
                text=record.text.decode(errors="replace"),
                position=record.position,
            )
            for record in part.records
        ]
        if part.lost_bytes:
            text = f"pantala: {part.lost_bytes} bytes of output were overwritten before they were read"
            first = records[0].timestamp_ns if records else 0
            at = position + part.lost_bytes
            records.insert(0, LogRecord(timestamp_ns=first, stream="stderr", text=text, position=at))
        return records

    def ring_path(self, machine_id: str) -> Path | None:
        path = self._folder(machine_id).ring
        return path if path.exists() else None

    # --- doctor ----------------------------------------------------------------------------------------------------

    async def probe(self) -> Probe:
        """Run a machine whose root has nothing but init, which prints its version as the app."""
        began = self._clock.monotonic()
        machine_id = f"probe-{secrets.token_hex(4)}"
        try:
            with anyio.fail_after(PROBE_DEADLINE_S):
                detail, ok = await self._probe(machine_id)
        except TimeoutError:
            detail, ok = f"no answer within {PROBE_DEADLINE_S:g} s", False
        except (PantalaError, OSError) as error:
            detail, ok = str(error), False
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(PantalaError, OSError):
                await self.destroy(machine_id)
        return Probe(ok=ok, detail=detail, took_ms=round((self._clock.monotonic() - began) * 1000))

    async def _probe(self, machine_id: str) -> tuple[str, bool]:
        runtime = self._find_runtime()
        layer = self._state_dir / "templates" / "empty"
        layer.mkdir(parents=True, exist_ok=True)
        attempt = _Attempt(
            machine_id=machine_id,
            instance_id=machine_id,
            layers=UnpackedImage(digest="", layers=(layer,), config=ImageConfig()).layers,
            netns=None,
            userns=None,
            limits=Limits(cpus=1, shared_cpu=True, memory_mib=64, pids=16, disk_mib=64),
            uid_base=1 << 30,
            hostname="probe",
            hosts="127.0.0.1 localhost\n",
            resolv_conf="",
        )
        await self._prepare(attempt)
        await self.start(machine_id, Start(argv=[oci.INIT_IN_MACHINE, "--version"], env={}))
        ended = await self.wait(machine_id)
        said = [record.text for record in await self.logs(machine_id, 0)]
        ok = ended.exit is not None and ended.exit.exit_code == 0 and bool(said)
        return f"{runtime} ran {said[0] if said else 'nothing'}" + ("" if ok else f", and ended {ended.exit}"), ok


def runtime_command(runtime: Path) -> list[str]:
    """The runtime with the options that keep it away from cgroups, which are ours."""
    if runtime.name == "crun":
        return [str(runtime), "--cgroup-manager=disabled"]
    return [str(runtime)]


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()[-STDERR_SHOWN:]
    return "it said nothing"
