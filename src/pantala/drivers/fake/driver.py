"""The `fake` driver: the semantics of `pantala.drivers.protocol` in memory, for tests and simulation.

A driver is a door into a `FakeWorld` and keeps nothing itself: dropping it is the kill of an agent, another one over
the same world is the agent that adopts.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal

import anyio

from pantala.domain.runtime import CPUUsage, MemoryUsage, ProcessInfo
from pantala.drivers.fake.world import SIGKILL, Due, FakeApp, FakeMachine, FakeWorld
from pantala.drivers.protocol import LogRecord, PrepareSpec, Probe, Runtime, not_isolated
from pantala.errors import DriverError
from pantala.kit.clock import unix_ms
from pantala.wire.guest import ContainerState, Exec, Executed, Start
from pantala.wire.machine import Isolation

LOGS_MAX = 1000
# Signals whose default is not to end a process.
_HARMLESS = frozenset({17, 18, 23, 28})


class FakeDriver:
    name = "fake"
    isolation: Literal["vm", "container", "none"] = "none"

    def __init__(self, world: FakeWorld) -> None:
        self._world = world

    def isolated(self, uid_base: int) -> Isolation:
        del uid_base
        return not_isolated(self.name)

    async def probe(self) -> Probe:
        return Probe(ok=True, detail="nothing is run for real", took_ms=0)

    async def prepare(self, spec: PrepareSpec) -> Runtime:
        world = self._world
        found = await self.inspect(spec.machine_id)
        if found is not None and found.phase != "exited":
            if found.instance_id == spec.instance_id:
                return found
            raise DriverError(f"machine {spec.machine_id} still runs instance {found.instance_id}; destroy that first")
        await self.clear(spec.machine_id)
        world.ensure_root(spec)
        machine = FakeMachine(spec, world.next_pid())
        world.machines[spec.machine_id] = machine
        world.on_step("preparing", spec.machine_id)
        world.check("prepare")
        await world.clock.sleep(world.prepare_delay_s)
        machine.is_prepared = True
        world.on_step("prepared", spec.machine_id)
        runtime = world.runtime(machine)
        if runtime is None:
            raise DriverError(f"machine {spec.machine_id} was destroyed while it was prepared", retry=True)
        return runtime

    async def start(self, machine_id: str, start: Start) -> int:
        world = self._world
        machine = self._get(machine_id)
        world.check("start")
        if machine.start is not None:
            return machine.pid
        if machine.has_ended:
            raise DriverError("the machine's init is gone", retry=True)
        app = world.app_for(machine_id, start)
        await world.clock.sleep(app.start_delay_s)
        if app.refusal:
            world.finish(machine, Due(at=0.0, exit_code=app.exit_code or 127), reason=app.refusal)
            raise DriverError(app.refusal, guest_fault=True)
        machine.start, machine.app = start, app
        machine.cpus = frozenset(start.cpus) or world.cpus
        machine.started_at_ms = unix_ms(world.clock.now())
        world.started.append(machine_id)
        root = world.roots[machine_id]
        if app.writes:
            root.lines.append(app.writes)
        for line in root.lines if app.tells_written else ():
            world.say(machine_id, line)
        for line in app.output:
            world.say(machine_id, line)
        for line in app.errors:
            world.say(machine_id, line, "stderr")
        if app.ends_after_s is not None:
            signal = SIGKILL if app.oom else app.ends_by_signal
            code = 128 + signal if signal else app.exit_code
            at = world.clock.monotonic() + app.ends_after_s
            world.schedule(machine, Due(at=at, exit_code=code, signal=signal, oom=app.oom))
        world.on_step("started", machine_id)
        return machine.pid

    async def stop(self, machine_id: str, *, signal: int, grace_s: float) -> None:
        world = self._world
        machine = self._get(machine_id)
        world.check("stop")
        runtime = world.runtime(machine)
        if runtime is None or runtime.phase == "exited":
            return
        world.thaw(machine)
        machine.stop_requested = True
        now = world.clock.monotonic()
        if machine.start is None:
            world.exit(machine_id, exit_code=0)
            return
        app = world.app_for(machine_id, machine.start)
        heeds = signal not in app.ignored and signal not in _HARMLESS and app.stop_delay_s < grace_s
        if not heeds:
            world.schedule(machine, Due(at=now + grace_s, exit_code=128 + SIGKILL, signal=SIGKILL))
        elif app.stop_exit_code is not None:
            world.schedule(machine, Due(at=now + app.stop_delay_s, exit_code=app.stop_exit_code))
        else:
            world.schedule(machine, Due(at=now + app.stop_delay_s, exit_code=128 + signal, signal=signal))

    async def signal(self, machine_id: str, signal: int) -> None:
        world = self._world
        machine = self._get(machine_id)
        world.check("signal")
        runtime = world.runtime(machine)
        if machine.frozen_at is not None:
            raise DriverError(f"machine {machine_id} is suspended")
        if runtime is None or runtime.phase != "running" or machine.start is None:
            raise DriverError("the app was not started")
        app = world.app_for(machine_id, machine.start)
        if signal == SIGKILL or (signal not in app.ignored and signal not in _HARMLESS):
            world.exit(machine_id, signal=signal)

    async def suspend(self, machine_id: str) -> None:
        world = self._world
        machine = self._get(machine_id)
        world.check("suspend")
        runtime = world.runtime(machine)
        if runtime is None or runtime.phase in ("prepared", "exited"):
            raise DriverError(f"machine {machine_id} does not run")
        world.freeze(machine)
        world.on_step("suspended", machine_id)

    async def resume(self, machine_id: str) -> None:
        world = self._world
        machine = self._get(machine_id)
        world.check("resume")
        if machine.has_ended:
            raise DriverError(f"what ran in machine {machine_id} is gone")
        world.thaw(machine)
        world.on_step("resumed", machine_id)

    async def wait(self, machine_id: str) -> Runtime:
        world = self._world
        machine = self._get(machine_id)
        while True:
            runtime = world.runtime(machine)
            if runtime is None:
                raise DriverError(f"there is no machine {machine_id}")
            if runtime.phase == "exited":
                return runtime
            await self._change(machine)

    async def _change(self, machine: FakeMachine) -> None:
        """Until something happens to the machine, or its time comes."""
        watcher = anyio.Event()
        machine.watchers.add(watcher)
        try:
            async with anyio.create_task_group() as group:
                if machine.due is not None and machine.frozen_at is None:
                    group.start_soon(self._ring, watcher, machine.due.at)
                await watcher.wait()
                group.cancel_scope.cancel()
        finally:
            machine.watchers.discard(watcher)

    async def _ring(self, watcher: anyio.Event, at: float) -> None:
        await self._world.clock.sleep(at - self._world.clock.monotonic())
        watcher.set()

    async def inspect(self, machine_id: str) -> Runtime | None:
        self._world.check("inspect")
        machine = self._world.machines.get(machine_id)
        return self._world.runtime(machine) if machine else None

    async def exec(self, machine_id: str, command: Exec) -> Executed:
        world = self._world
        machine = self._get(machine_id)
        runtime = world.runtime(machine)
        if runtime is None or runtime.phase != "running":
            raise DriverError("the app was not started")
        app = world.apps.get(tuple(command.argv)) or FakeApp()
        if app.refusal:
            raise DriverError(app.refusal, guest_fault=True)
        takes_s = command.timeout_ms / 1000 if app.ends_after_s is None else app.ends_after_s
        await world.clock.sleep(min(takes_s, command.timeout_ms / 1000))
        timed_out = app.ends_after_s is None
        signal = SIGKILL if timed_out else app.ends_by_signal
        return Executed(
            exit_code=128 + signal if signal else app.exit_code,
            signal=signal,
            stdout_base64=_base64_lines(app.output),
            stderr_base64=_base64_lines(app.errors),
            timed_out=timed_out,
        )

    async def calls(self, machine_id: str) -> AsyncGenerator[socket.socket]:
        """Nothing of a fake machine calls."""
        await self.wait(machine_id)
        for call in ():
            yield call

    async def containers(self, machine_id: str) -> list[ContainerState]:
        machine = self._get(machine_id)
        runtime = self._world.runtime(machine)
        if machine.start is None or runtime is None or runtime.phase != "running":
            return []
        return [ContainerState(name=one.name, state="started") for one in machine.start.containers]

    async def processes(self, machine_id: str) -> list[ProcessInfo]:
        machine = self._world.machines.get(machine_id)
        runtime = self._world.runtime(machine) if machine else None
        if machine is None or machine.start is None or runtime is None or runtime.phase != "running":
            return []
        names = ("/.pantala/init", " ".join(machine.start.argv))
        return [
            ProcessInfo(pid=pid, command=name, directory="/", cpu_ticks=0, runs_s=0.0, rss_bytes=4096)
            for pid, name in enumerate(names, 1)
        ]

    def cpu_usage(self, machine_id: str) -> CPUUsage | None:
        machine = self._world.machines.get(machine_id)
        if machine is None:
            return None
        return CPUUsage(run=str(machine.pid), used_us=machine.cpu_used_us, throttled_us=machine.cpu_throttled_us)

    def set_cpu_quota(self, machine_id: str, quota_us: int) -> None:
        if (machine := self._world.machines.get(machine_id)) is not None:
            machine.cpu_quota_us = quota_us

    def cpus(self, machine_id: str) -> frozenset[int] | None:
        machine = self._world.machines.get(machine_id)
        return machine.cpus if machine is not None else None

    def move_cpus(self, machine_id: str, old: frozenset[int], new: frozenset[int]) -> None:
        machine = self._world.machines.get(machine_id)
        if machine is not None and machine.cpus == old:
            machine.cpus = new

    async def memory(self, machine_id: str) -> MemoryUsage | None:
        machine = self._world.machines.get(machine_id)
        if machine is None:
            return None
        return MemoryUsage(limit_mib=machine.memory_limit_mib or machine.spec.limits.memory_mib, used_mib=0)

    async def set_memory_limit(self, machine_id: str, limit_mib: int) -> None:
        machine = self._world.machines.get(machine_id)
        if machine is None:
            raise DriverError(f"nothing of machine {machine_id} is there")
        machine.memory_limit_mib = limit_mib

    async def reclaim_memory(self, machine_id: str, amount_mib: int) -> int:
        if self._world.machines.get(machine_id) is None:
            raise DriverError(f"nothing of machine {machine_id} is there")
        return 0

    async def destroy(self, machine_id: str) -> None:
        self._world.check("destroy")
        machine = self._world.machines.pop(machine_id, None)
        self._world.roots.pop(machine_id, None)
        if machine is not None:
            machine.is_prepared = False
            machine.changed()

    async def clear(self, machine_id: str) -> None:
        root = self._world.roots.get(machine_id)
        await self.destroy(machine_id)
        if root is not None and root.is_kept:
            self._world.roots[machine_id] = root

    async def list(self) -> list[str]:
        return sorted(self._world.machines.keys() | self._world.roots.keys())

    async def logs(self, machine_id: str, position: int) -> list[LogRecord]:
        machine = self._world.machines.get(machine_id)
        records = machine.records if machine else []
        if records and position > records[-1].position:
            position = 0
        return [record for record in records if record.position > position][:LOGS_MAX]

    def ring_path(self, machine_id: str) -> Path | None:
        return None

    def _get(self, machine_id: str) -> FakeMachine:
        machine = self._world.machines.get(machine_id)
        if machine is None or not machine.is_prepared:
            raise DriverError(f"machine {machine_id} is not prepared", retry=True)
        return machine


def _base64_lines(lines: tuple[str, ...]) -> str:
    return base64.b64encode("".join(f"{line}\n" for line in lines).encode()).decode()
