"""Says when a machine is stuck on its way: a transient state that lasts longer than it may gets an entry in the
machine's history that names the state, who asked for it, what it waits for, and what happens then.

The steps have deadlines of their own (`agent/context.py`, Pace), which end them whether somebody looks or not: a start
that waits too long for its image fails, an app that does not end is killed, what cannot be removed is tried again.
"""

from __future__ import annotations

import structlog

from pantala.agent.events import event
from pantala.agent.host import Host
from pantala.agent.machine import MachineTask
from pantala.agent.subset import Subset
from pantala.domain import signals
from pantala.domain.machine import State
from pantala.errors import PantalaError
from pantala.journal import MachineRecord
from pantala.kit.clock import rfc3339_ms

log = structlog.get_logger()

LOOK_EVERY_S = 5.0
_THEN = {
    State.STARTING: "it fails when its image has not come within {image_s:g} s, or the app does not come up",
    State.STOPPING: "the app is killed, and what is left of it removed again and again",
    State.RESTARTING: "it is started again",
    State.SUSPENDING: "it is stopped instead",
    State.UPDATING: "the app is killed, and the new version takes its place",
    State.DESTROYING: "what is left of it is removed again and again",
}


class Overdue:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._told: dict[str, int] = {}
        self._on_their_way = Subset(host, lambda record: record.state in _THEN)

    async def run(self) -> None:
        while True:
            await self._host.context.clock.tick(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        self._told = {key: since for key, since in self._told.items() if key in self._host.machines}
        for task in self._on_their_way.tasks():
            record = task.record
            may_last_s = may_last(record)
            late = may_last_s and record.state_since_ms and self._now_ms() - record.state_since_ms > may_last_s * 1000
            if late and self._told.get(record.id) != record.state_since_ms:
                self._told[record.id] = record.state_since_ms
                await self._tell(task, may_last_s)

    async def _tell(self, task: MachineTask, may_last_s: float) -> None:
        record, context = task.record, self._host.context
        then = _THEN[record.state].format(image_s=context.pace.image_s)
        reason = (
            f"{record.state} for more than {may_last_s / 60:g} min on {context.node}, asked for by "
            f"{asked_by(record)}: {task.doing or waits_for(record) or 'nothing is said of why'}; {then}"
        )
        log.error("machine is stuck", app=record.app.name, machine=record.id, reason=reason)
        try:
            await task.keeper.change(
                lambda r: r, events=(event("stuck", str(record.state), "flyd", self._now_ms(), reason=reason),)
            )
        except PantalaError as error:
            log.warning("the journal takes nothing", machine=record.id, error=str(error))

    def _now_ms(self) -> int:
        return int(self._host.context.clock.now().timestamp() * 1000)


def asked_by(record: MachineRecord) -> str:
    """A restart is the policy's own idea; whoever once wanted the machine to run asked for no more."""
    return "flyd" if record.state is State.RESTARTING else record.desired.source


def waits_for(record: MachineRecord) -> str:
    if record.state is State.RESTARTING and record.restart_at_ms:
        return f"{record.reason}; it is started again at {rfc3339_ms(record.restart_at_ms)}"
    return record.reason


def may_last(record: MachineRecord) -> float:
    """Seconds after which a state is stuck; 0 for one that lasts."""
    if record.state not in _THEN:
        return 0.0
    grace_s = signals.stop_timeout_s(record.version.config.stop_config, record.desired.timeout_s)
    if record.state is State.UPDATING:
        return 600.0 + grace_s
    return 300.0 + (grace_s if record.state in (State.STOPPING, State.DESTROYING) else 0.0)
