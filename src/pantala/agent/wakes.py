"""A request waits for a sleeping machine: start it, wait until it is ready, or say why not in the proxy's words."""

from __future__ import annotations

import anyio
import structlog
from msgspec.structs import replace

from pantala.agent import view
from pantala.agent.host import Host
from pantala.agent.machine import MachineTask
from pantala.domain import guests
from pantala.domain.machine import State, Verb
from pantala.errors import CapacityError, PantalaError, WrongState
from pantala.journal import Desired, MachineRecord
from pantala.wire.feed import WakeResult

log = structlog.get_logger()


_UP = frozenset({State.STARTING, State.STARTED})
"""What was resumed is looked at (`keeper.health`) before its record says started."""
_ENDED = frozenset({State.FAILED, State.LAUNCH_FAILED, State.STOPPED, State.DESTROYED})


class Wakes:
    def __init__(self, host: Host) -> None:
        self._host = host

    async def wake(self, machine_id: str, deadline_s: float) -> WakeResult:
        """Never raises; the proxy sets the id. However many ask, the machine is started once."""
        begun = self._host.context.clock.monotonic()
        try:
            with anyio.move_on_after(deadline_s):
                return await self._wake(machine_id)
            result = self._too_late(machine_id, deadline_s)
        except CapacityError as error:
            result = refused(machine_id, "PM07", error.message)
        except WrongState as error:
            result = refused(machine_id, "PM08", error.message)
        except PantalaError as error:
            result = refused(machine_id, "PM02", error.message)
        took_ms = round((self._host.context.clock.monotonic() - begun) * 1000)
        log.warning("wake refused", machine=machine_id, code=result.code, reason=result.reason, took_ms=took_ms)
        return result

    async def _wake(self, machine_id: str) -> WakeResult:
        task = self._host.machines.get(machine_id)
        if task is None:
            return refused(machine_id, "PM08", "the machine is not on this host")
        begun = self._host.context.clock.monotonic()
        met = await task.keeper.admit(Verb.START, _wanted, source="proxy", guard=self._may_wake)
        while True:
            changed = task.keeper.changed()
            record, health = task.record, task.keeper.health
            if record.state in _UP and health is not None and health.ready.is_set():
                took_ms = round((self._host.context.clock.monotonic() - begun) * 1000)
                log.info(
                    "machine woken",
                    app=record.app.name,
                    machine=machine_id,
                    how="resume" if met.state is State.SUSPENDED else "cold",
                    took_ms=took_ms,
                )
                return WakeResult(id=0, machine=machine_id, ok=True, ip4=record.ip4)
            if _gave_up(record):
                why = record.reason or "it ended before it was ready"
                return refused(machine_id, "PM07", f"the machine is {record.state}: {why}")
            await self._wait(task, changed)

    async def _wait(self, task: MachineTask, changed: anyio.Event) -> None:
        """Until the record changes or it becomes ready, whatever comes first."""
        health = task.keeper.health
        if health is None or task.record.state not in _UP:
            await changed.wait()
            return
        async with anyio.create_task_group() as tasks:

            async def first(event: anyio.Event) -> None:
                await event.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(first, changed)
            tasks.start_soon(first, health.ready)

    def _may_wake(self, record: MachineRecord) -> None:
        if record.cordoned:
            raise WrongState("the machine is cordoned")
        if record.state in (State.FAILED, State.LAUNCH_FAILED):
            raise WrongState(f"the machine is {record.state}: {record.reason}")
        if record.state is not State.STARTED and not view.wants_wake(record.version.config):
            raise WrongState(f"the machine is {record.state} and its services have no autostart")
        if record.state in (State.STOPPED, State.CREATED):
            self._host.check_room(guests.resolve(record.version.config), without=record.id)

    def _too_late(self, machine_id: str, deadline_s: float) -> WakeResult:
        task = self._host.machines.get(machine_id)
        health = task.keeper.health if task is not None else None
        why = f"not ready within {deadline_s:g} s"
        if health is not None and health.explanation:
            why += f"; {health.explanation}"
        elif task is not None:
            why += f"; it is {task.record.state}"
        return refused(machine_id, "PM03", why)


def _wanted(record: MachineRecord) -> MachineRecord:
    return replace(record, desired=Desired(goal="started", source="proxy"), restarts_ms=(), restart_at_ms=0)


def _gave_up(record: MachineRecord) -> bool:
    return record.state in _ENDED and record.desired.goal != "started"


def refused(machine_id: str, code: str, reason: str) -> WakeResult:
    return WakeResult(id=0, machine=machine_id, ok=False, code=code, reason=reason, elsewhere=True)
