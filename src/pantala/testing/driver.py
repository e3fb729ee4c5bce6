"""A driver in memory whose machines do what a test says. It outlives the agent, as real machines do."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal

import anyio
import anyio.lowlevel
import msgspec

from pantala.domain.runtime import CPUUsage, ListenSocket, MemoryUsage, ProcessInfo
from pantala.drivers.protocol import LogRecord, Phase, PrepareSpec, Probe, Runtime, not_isolated
from pantala.errors import DriverError
from pantala.wire.guest import ContainerState, Exec, Executed, ExitRecord, Start
from pantala.wire.machine import Isolation

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # compared with and reported, never bound


class Behaviour(msgspec.Struct, kw_only=True):
    """How machines behave. `listens` is where the app accepts; `exits_with`: it ends at once with that code."""

    listens: tuple[tuple[str, int], ...] = ((EVERYWHERE[0], 8080),)
    exits_with: int | None = None
    ignores_stop: bool = False
    prepare_fails: str = ""
    start_fails: str = ""
    guest_fault: bool = False
    suspend_fails: str = ""
    resume_fails: str = ""


class _Machine:
    def __init__(self, spec: PrepareSpec) -> None:
        self.spec = spec
        self.phase: Phase = "prepared"
        self.exit: ExitRecord | None = None
        self.oom_killed = False
        self.gone = anyio.Event()
        self.started_at_ms = 0
        self.start: Start | None = None
        self.stop_asked = False
        self.memory_limit_mib = 0
        self.logs: list[LogRecord] = []


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class ScriptedDriver:
    name = "fake"
    isolation: Literal["vm", "container", "none"] = "none"

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.by_machine: dict[str, Behaviour] = {}
        self.machines: dict[str, _Machine] = {}
        self.kept: dict[str, str] = {}  # roots that a later run may go on with: whose instance's
        self.roots_made: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.executed: list[Exec] = []
        self.callers: dict[str, list[socket.socket]] = {}
        self._called = anyio.Event()
        self.contained: dict[str, list[ContainerState]] = {}
        self.answer = Executed(exit_code=0)
        self.resumes: dict[str, int] = {}

    def isolated(self, uid_base: int) -> Isolation:
        del uid_base
        return not_isolated(self.name)

    # -- what a test does to machines -------------------------------------------------------------------------------

    def crash(self, machine_id: str, *, exit_code: int = 1, signal: int = 0, oom: bool = False) -> None:
        machine = self.machines[machine_id]
        machine.oom_killed = oom
        self._end(machine, exit_code, signal)

    def say(self, machine_id: str, text: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
        logs = self.machines[machine_id].logs
        logs.append(LogRecord(timestamp_ns=time.time_ns(), stream=stream, text=text, position=len(logs) + 1))

    def suspended(self) -> set[str]:
        return {key for key, machine in self.machines.items() if machine.phase == "suspended"}

    def running(self) -> set[str]:
        return {key for key, machine in self.machines.items() if machine.phase == "running"}

    def accepts(self, machine_id: str, port: int) -> bool:
        if machine_id not in self.running():
            return False
        return any(p == port and a in EVERYWHERE for a, p in self._of(machine_id).listens)

    def listening(self, machine_id: str) -> list[ListenSocket]:
        if machine_id not in self.running():
            return []
        return [ListenSocket(proto="tcp", address=a, port=p, inode=p) for a, p in self._of(machine_id).listens]

    # -- Driver -----------------------------------------------------------------------------------------------------

    async def probe(self) -> Probe:
        return Probe(ok=True, detail="machines of a test", took_ms=0)

    async def prepare(self, spec: PrepareSpec) -> Runtime:
        await anyio.lowlevel.checkpoint()
        behaviour = self._of(spec.machine_id)
        if behaviour.prepare_fails:
            raise DriverError(behaviour.prepare_fails)
        known = self.machines.get(spec.machine_id)
        if known is not None and not (known.phase == "prepared" and known.spec.instance_id == spec.instance_id):
            raise DriverError(f"{spec.machine_id} still owns something; destroy it first")
        if known is None:
            self._make_root(spec)
            self.machines[spec.machine_id] = _Machine(spec)
        await anyio.lowlevel.checkpoint()
        return self._runtime(spec.machine_id)

    async def start(self, machine_id: str, start: Start) -> int:
        await anyio.lowlevel.checkpoint()
        machine = self._get(machine_id)
        behaviour = self._of(machine_id)
        if machine.phase != "prepared":
            raise DriverError(f"{machine_id} is {machine.phase}, not prepared")
        if behaviour.start_fails:
            self._end(machine, 127, 0, behaviour.start_fails)
            raise DriverError(behaviour.start_fails, guest_fault=behaviour.guest_fault)
        machine.phase, machine.start, machine.started_at_ms = "running", start, _now_ms()
        self.starts[machine_id] = self.starts.get(machine_id, 0) + 1
        if behaviour.exits_with is not None:
            self._end(machine, behaviour.exits_with, 0)
        await anyio.lowlevel.checkpoint()
        return 2

    async def stop(self, machine_id: str, *, signal: int, grace_s: float) -> None:
        await anyio.lowlevel.checkpoint()
        machine = self.machines.get(machine_id)
        if machine is None or machine.phase == "exited":
            return
        machine.stop_asked = True
        ignores = self._of(machine_id).ignores_stop and signal != 9
        self._end(machine, 137 if ignores else 128 + signal, 9 if ignores else signal)

    async def signal(self, machine_id: str, signal: int) -> None:
        await anyio.lowlevel.checkpoint()
        if signal == 9:
            self._end(self._get(machine_id), 137, 9)

    async def suspend(self, machine_id: str) -> None:
        await anyio.lowlevel.checkpoint()
        machine = self._get(machine_id)
        if machine.phase not in ("running", "suspended"):
            raise DriverError(f"machine {machine_id} does not run")
        if self._of(machine_id).suspend_fails:
            raise DriverError(self._of(machine_id).suspend_fails)
        machine.phase = "suspended"
        await anyio.lowlevel.checkpoint()

    async def resume(self, machine_id: str) -> None:
        await anyio.lowlevel.checkpoint()
        machine = self._get(machine_id)
        if self._of(machine_id).resume_fails or machine.phase == "exited":
            raise DriverError(self._of(machine_id).resume_fails or f"what ran in machine {machine_id} is gone")
        if machine.phase == "suspended":
            machine.phase = "running"
            self.resumes[machine_id] = self.resumes.get(machine_id, 0) + 1
        await anyio.lowlevel.checkpoint()

    async def wait(self, machine_id: str) -> Runtime:
        machine = self._get(machine_id)
        await machine.gone.wait()
        return self._describe(machine_id, machine)

    async def inspect(self, machine_id: str) -> Runtime | None:
        await anyio.lowlevel.checkpoint()
        return self._runtime(machine_id) if machine_id in self.machines else None

    async def exec(self, machine_id: str, command: Exec) -> Executed:
        await anyio.lowlevel.checkpoint()
        self._get(machine_id)
        self.executed.append(command)
        return self.answer

    async def calls(self, machine_id: str) -> AsyncGenerator[socket.socket]:
        waiting = self.callers[machine_id] = []
        while True:
            while not waiting:
                self._called = anyio.Event()
                await self._called.wait()
            yield waiting.pop(0)

    def call(self, machine_id: str) -> socket.socket:
        """A process of the machine has connected: its end of the connection."""
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        self.callers[machine_id].append(theirs)
        self._called.set()
        return ours

    async def containers(self, machine_id: str) -> list[ContainerState]:
        await anyio.lowlevel.checkpoint()
        if machine_id not in self.running():
            return []
        if machine_id in self.contained:
            return self.contained[machine_id]
        start = self.machines[machine_id].start
        return [ContainerState(name=one.name, state="started") for one in (start.containers if start else [])]

    async def processes(self, machine_id: str) -> list[ProcessInfo]:
        if machine_id not in self.running():
            return []
        app = frozenset(port for _, port in self._of(machine_id).listens)
        return [
            ProcessInfo(pid=pid, command="", directory="/", cpu_ticks=0, runs_s=0.0, rss_bytes=0, sockets=sockets)
            for pid, sockets in ((1, frozenset[int]()), (2, app))
        ]

    def cpu_usage(self, machine_id: str) -> CPUUsage | None:
        machine = self.machines.get(machine_id)
        return CPUUsage(run=str(id(machine)), used_us=0) if machine is not None else None

    def set_cpu_quota(self, machine_id: str, quota_us: int) -> None:
        pass

    def cpus(self, machine_id: str) -> frozenset[int] | None:
        return frozenset({0}) if machine_id in self.machines else None

    def move_cpus(self, machine_id: str, old: frozenset[int], new: frozenset[int]) -> None:
        pass

    async def memory(self, machine_id: str) -> MemoryUsage | None:
        machine = self.machines.get(machine_id)
        if machine is None:
            return None
        return MemoryUsage(limit_mib=machine.memory_limit_mib or machine.spec.limits.memory_mib, used_mib=0)

    async def set_memory_limit(self, machine_id: str, limit_mib: int) -> None:
        machine = self.machines.get(machine_id)
        if machine is None:
            raise DriverError(f"nothing of machine {machine_id} is there")
        machine.memory_limit_mib = limit_mib

    async def reclaim_memory(self, machine_id: str, amount_mib: int) -> int:
        if self.machines.get(machine_id) is None:
            raise DriverError(f"nothing of machine {machine_id} is there")
        return 0

    async def clear(self, machine_id: str) -> None:
        kept = self.kept.get(machine_id)
        await self.destroy(machine_id)
        if kept is not None:
            self.kept[machine_id] = kept

    async def destroy(self, machine_id: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.kept.pop(machine_id, None)
        machine = self.machines.pop(machine_id, None)
        if machine is not None:
            self._end(machine, 137, 9)

    async def list(self) -> list[str]:
        return sorted(self.machines.keys() | self.kept.keys())

    async def logs(self, machine_id: str, position: int) -> list[LogRecord]:
        machine = self.machines.get(machine_id)
        return [record for record in machine.logs if record.position > position][:1000] if machine else []

    def ring_path(self, machine_id: str) -> Path | None:
        return None

    # -- footnotes ----------------------------------------------------------------------------------------------------

    def _make_root(self, spec: PrepareSpec) -> None:
        before = self.kept.pop(spec.machine_id, None)
        goes_on = spec.root_kept == "always" or (spec.root_kept == "restart" and before == spec.instance_id)
        if before is None or not goes_on:
            self.roots_made[spec.machine_id] = self.roots_made.get(spec.machine_id, 0) + 1
        if spec.root_kept != "never":
            self.kept[spec.machine_id] = spec.instance_id

    def _of(self, machine_id: str) -> Behaviour:
        return self.by_machine.get(machine_id, self.behaviour)

    def _get(self, machine_id: str) -> _Machine:
        machine = self.machines.get(machine_id)
        if machine is None:
            raise DriverError(f"there is no machine {machine_id}")
        return machine

    def _end(self, machine: _Machine, exit_code: int, signal: int, reason: str = "") -> None:
        if machine.phase == "exited":
            return
        machine.phase = "exited"
        machine.exit = ExitRecord(
            exit_code=exit_code,
            signal=signal,
            requested_stop=machine.stop_asked,
            started_at_ms=machine.started_at_ms,
            exited_at_ms=_now_ms(),
            reason=reason,
        )
        machine.gone.set()

    def _runtime(self, machine_id: str) -> Runtime:
        return self._describe(machine_id, self._get(machine_id))

    def _describe(self, machine_id: str, machine: _Machine) -> Runtime:
        return Runtime(
            machine_id=machine_id,
            instance_id=machine.spec.instance_id,
            phase=machine.phase,
            pid=0 if machine.phase == "exited" else 1000,
            exit=machine.exit,
            oom_killed=machine.oom_killed,
        )
