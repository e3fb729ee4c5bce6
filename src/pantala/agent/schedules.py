"""Runs scheduled machines: looks once a second which of them are due. The next run and the last ones are journaled
with the machine, so a new agent knows what was missed while there was none.

A run that is due is started at most once, and no later than `catch_up_s` after its time: later ones, and all but the
newest of several, are recorded as missed. Without room on the host it waits that long. A machine that still runs, or is
on its way, is left alone and the run is recorded as skipped.
"""

from __future__ import annotations

from datetime import UTC, datetime

import structlog
from msgspec.structs import replace

from pantala.agent.events import event
from pantala.agent.host import Host
from pantala.agent.machine import MachineTask
from pantala.agent.subset import Subset
from pantala.domain import guests, schedule
from pantala.domain.machine import State, Verb
from pantala.errors import CapacityError, Conflict, PantalaError
from pantala.journal import Desired, MachineRecord, RunRecord, ScheduleRecord
from pantala.kit.clock import rfc3339_ms, unix_ms
from pantala.wire.machine import Event

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
RUNS_KEPT = 10
_MAY_START = frozenset({State.CREATED, State.STOPPED, State.FAILED})
_BUSY = {
    State.STARTED: "the machine was still running",
    State.STARTING: "the machine was still running",
    State.RESTARTING: "the run before had failed and was being tried again",
}


class Schedules:
    def __init__(self, host: Host, *, catch_up_s: float) -> None:
        self._host = host
        self._catch_up_ms = int(catch_up_s * 1000)
        self._scheduled = Subset(host, _has_schedule)

    async def run(self) -> None:
        while True:
            await self.look()
            await self._host.context.clock.tick(LOOK_EVERY_S)

    async def look(self) -> None:
        for task in self._scheduled.tasks():
            if not _has_schedule(task.record):  # it changed while another one was looked at
                continue
            try:
                await self._look_at(task)
            except PantalaError as error:
                log.warning("schedule not kept; looked at again", machine=task.record.id, error=error.message)

    async def _look_at(self, task: MachineTask) -> None:
        record, now_ms = task.record, unix_ms(self._host.context.clock.now())
        expression, known = record.version.config.schedule, record.schedule
        if not expression:
            await task.keeper.change(lambda r: replace(r, schedule=None))
        elif known is None or known.expression != expression:
            await self._begin(task, expression, now_ms)
        elif known.next_ms <= now_ms:
            await self._due(task, known, now_ms)

    async def _begin(self, task: MachineTask, expression: str, now_ms: int) -> None:
        """Words count from the first start, which is the caller's."""
        before = task.record.schedule
        anchor_ms = before.anchor_ms if before is not None and before.anchor_ms else task.record.started_at_ms
        if schedule.needs_anchor(expression) and not anchor_ms:
            return
        made = ScheduleRecord(
            expression=expression,
            anchor_ms=anchor_ms,
            next_ms=_next_ms(expression, anchor_ms, now_ms),
            runs=before.runs if before is not None else (),
        )
        shown = event("schedule", "planned", "flyd", now_ms, reason=f"runs next at {rfc3339_ms(made.next_ms)}")
        await task.keeper.change(lambda r: replace(r, schedule=made), events=(shown,))

    async def _due(self, task: MachineTask, known: ScheduleRecord, now_ms: int) -> None:
        due_ms = unix_ms(schedule.last_run(known.expression, anchor=_at(known.anchor_ms), until=_at(now_ms)))
        runs: list[RunRecord] = []
        if due_ms > known.next_ms:
            why = f"its time passed, and so did that of later runs until {rfc3339_ms(due_ms)}"
            runs.append(RunRecord(due_ms=known.next_ms, outcome="missed", reason=why))
        late_s = (now_ms - due_ms) // 1000
        if task.record.state not in _MAY_START or task.record.queued():
            why = _BUSY.get(task.record.state, f"the machine was {task.record.state}")
            await self._pass(task, known, [*runs, RunRecord(due_ms=due_ms, outcome="skipped", reason=why)], now_ms)
            return
        if now_ms - due_ms > self._catch_up_ms:
            why = f"it was {late_s} s late; runs are caught up within {self._catch_up_ms // 1000} s"
            await self._pass(task, known, [*runs, RunRecord(due_ms=due_ms, outcome="missed", reason=why)], now_ms)
            return
        try:
            self._host.check_room(guests.resolve(task.record.version.config), without=task.record.id)
        except CapacityError as error:
            if not known.waits or runs:
                told = event("schedule", "waiting", "flyd", now_ms, reason=error.message)
                waiting = replace(known, waits=True, next_ms=due_ms, runs=_newest(runs, known.runs))
                await task.keeper.change(lambda r: replace(r, schedule=waiting), events=(*_told(runs, now_ms), told))
            return
        await self._start(task, known, [*runs, RunRecord(due_ms=due_ms, outcome="started")], now_ms)

    async def _pass(self, task: MachineTask, known: ScheduleRecord, runs: list[RunRecord], now_ms: int) -> None:
        await task.keeper.change(lambda r: replace(r, schedule=_after(known, runs, now_ms)), events=_told(runs, now_ms))

    async def _start(self, task: MachineTask, known: ScheduleRecord, begun: list[RunRecord], now_ms: int) -> None:
        def guard(record: MachineRecord) -> None:
            if record.state not in _MAY_START or record.queued() or record.schedule != known:
                raise Conflict("something else was asked of the machine")

        def want(record: MachineRecord) -> MachineRecord:
            return replace(
                record,
                desired=Desired(goal="started", source="flyd"),
                restarts_ms=(),
                restart_at_ms=0,
                schedule=_after(known, begun, now_ms),
            )

        await task.keeper.admit(Verb.START, want, source="flyd", guard=guard, events=_told(begun, now_ms))


def _has_schedule(record: MachineRecord) -> bool:
    return bool(record.version.config.schedule or record.schedule) and not record.hidden and not record.desired.ends


def _after(known: ScheduleRecord, runs: list[RunRecord], now_ms: int) -> ScheduleRecord:
    return replace(
        known,
        next_ms=_next_ms(known.expression, known.anchor_ms, now_ms),
        runs=_newest(runs, known.runs),
        waits=False,
    )


def _newest(runs: list[RunRecord], before: tuple[RunRecord, ...]) -> tuple[RunRecord, ...]:
    return (*reversed(runs), *before)[:RUNS_KEPT]


def _told(runs: list[RunRecord], now_ms: int) -> tuple[Event, ...]:
    """One entry of the history for each run."""
    return tuple(
        event(
            "schedule",
            run.outcome,
            "flyd",
            now_ms,
            reason=f"due at {rfc3339_ms(run.due_ms)}" + (f": {run.reason}" if run.reason else ""),
        )
        for run in runs
    )


def _next_ms(expression: str, anchor_ms: int, now_ms: int) -> int:
    return unix_ms(schedule.next_run(expression, anchor=_at(anchor_ms), after=_at(now_ms)))


def _at(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)
