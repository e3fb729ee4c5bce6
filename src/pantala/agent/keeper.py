"""Keeps one machine's record: every change goes to the journal with its history, then to the catalogue, then to those
who wait for it. The machine task and the requests admitted to it take turns here.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio
import structlog
from msgspec.structs import replace

from pantala.agent import view
from pantala.agent.context import Context
from pantala.agent.events import event
from pantala.agent.health import Health
from pantala.agent.outcomes import can_start_at_once
from pantala.domain import containers
from pantala.domain.machine import TERMINAL, Ignored, Refused, State, Verb, judge, may_follow
from pantala.errors import InternalError, PantalaError
from pantala.journal import Change, Desired, MachineRecord, Step, Version
from pantala.kit.clock import unix_ms
from pantala.kit.rows import Row
from pantala.wire.machine import CheckStatus, ContainerStatus, Event

log = structlog.get_logger()

Update = Callable[[MachineRecord], MachineRecord]
Outcome = tuple[str, bytes]
Guard = Callable[[MachineRecord], None]
MakeOutcome = Callable[[MachineRecord, MachineRecord], Outcome | None]


class Keeper:
    def __init__(self, context: Context, record: MachineRecord, last_event_id: str = "") -> None:
        self.record = record
        self.last_event_id = last_event_id
        self.health: Health | None = None
        self.turn = anyio.Lock()
        self._context = context
        self.accepted: Callable[[Verb], None] = lambda verb: None
        self.written: Callable[[], None] = lambda: None
        self._changed = anyio.Event()

    def now_ms(self) -> int:
        return unix_ms(self._context.clock.now())

    async def change(
        self,
        update: Update,
        *,
        events: tuple[Event, ...] = (),
        begin: str = "",
        end: tuple[str, ...] = (),
        in_haste: bool = False,
    ) -> MachineRecord:
        """Apply `update` to the newest record; on disk and published when this returns (`in_haste`: written)."""
        async with self.turn:
            await self.write(update(self.record), events=events, begin=begin, end=end, in_haste=in_haste)
        await self.publish()
        return self.record

    async def write(
        self,
        record: MachineRecord,
        *,
        events: tuple[Event, ...] = (),
        begin: str = "",
        end: tuple[str, ...] = (),
        outcome: Outcome | None = None,
        fence: tuple[str, int] | None = None,
        in_haste: bool = False,
    ) -> None:
        """Journal a record made from the newest one; the caller holds `turn` and publishes afterwards."""
        before = self.record.state
        if not may_follow(before, record.state):
            raise InternalError(f"machine {record.id} cannot go from {before} to {record.state}")
        now_ms = self.now_ms()
        record = replace(
            record,
            updated_at_ms=now_ms,
            state_since_ms=now_ms if before != record.state else self.record.state_since_ms,
        )
        await self._context.journal.commit(
            Change(
                machine=record,
                events=events,
                versions=self._new_versions(record),
                begin=Step(record.id, begin) if begin else None,
                end=tuple(Step(record.id, kind) for kind in end),
                outcome=outcome,
                fence=fence,
                in_haste=in_haste,
                at_ms=now_ms,
            )
        )
        self.record = record
        self.written()
        if events:
            self.last_event_id = events[-1].id
        if before != record.state:
            log.info(
                "machine state",
                app=record.app.name,
                machine=record.id,
                was=str(before),
                now=str(record.state),
                why=record.reason,
            )
        self.announce()

    def _new_versions(self, record: MachineRecord) -> tuple[Version, ...]:
        known = (self.record.version, self.record.next_version)
        return tuple(v for v in (record.version, record.next_version) if v is not None and v not in known)

    async def note(self, outcome: Outcome | None) -> None:
        """Keep the outcome of a request that changes nothing."""
        if outcome is not None:
            await self._context.journal.commit(Change(outcome=outcome, at_ms=self.now_ms()))

    # -- requests ------------------------------------------------------------------------------------------------------

    async def admit(
        self,
        verb: Verb,
        want: Update,
        *,
        force: bool = False,
        source: str = "user",
        guard: Guard | None = None,
        outcome: MakeOutcome | None = None,
        events: tuple[Event, ...] = (),
    ) -> MachineRecord:
        """Journal what a request wants, with `events`; the record it met.

        `guard` (leases, expected versions) raises before anything is written, so does a refusal of the judge.
        `outcome` makes, of the record met and the new one, what a repetition of the request will be answered.
        """
        async with self.turn:
            met = self.record
            if guard is not None:
                guard(met)
            judgement = judge(met.state, met.queued(), verb, force=force)
            if isinstance(judgement, Refused):
                raise judgement.error(judgement.reason)
            if isinstance(judgement, Ignored):
                await self.note(outcome(met, met) if outcome else None)
                return met
            wanted = want(met)
            kept = outcome(met, wanted) if outcome else None
            at_ms = self.now_ms()
            if verb is Verb.START and can_start_at_once(met):
                # A wake is one write: what is wanted and the step that does it go to the journal together. Nobody is
                # told that a request's wake was accepted, and a power cut ends what it woke.
                how = "resume" if met.state is State.SUSPENDED else ""
                await self.write(
                    replace(wanted, state=State.STARTING, reason=""),
                    events=(*events, event("start", "starting", source, at_ms, reason=how)),
                    begin="start",
                    outcome=kept,
                    in_haste=source == "proxy",
                )
            else:
                await self.write(wanted, events=events, outcome=kept)
            self.accepted(verb)
        return met

    async def fence(self, generation: int, outcome: Outcome | None) -> None:
        """This copy ends, whatever else was asked of it; on disk when it returns. It is drained by its task."""
        async with self.turn:
            met = self.record
            fence = (met.id, generation)
            if met.state in TERMINAL or met.desired.ends:
                await self.write(met, outcome=outcome, fence=fence)
                return
            wanted = replace(met, desired=Desired(goal="migrated", source="flyd"), next_version=None)
            begun = event("migrate", "migrating", "flyd", self.now_ms(), reason=f"generation {generation} is elsewhere")
            await self.write(wanted, events=(begun,), outcome=outcome, fence=fence)
            self.accepted(Verb.DESTROY)

    async def alter(
        self,
        update: Update,
        *,
        guard: Guard | None = None,
        outcome: MakeOutcome | None = None,
    ) -> MachineRecord:
        """A change that needs no work on the machine: cordon, metadata, leases. The new record."""
        async with self.turn:
            met = self.record
            if guard is not None:
                guard(met)
            changed = update(met)
            await self.write(changed, outcome=outcome(met, changed) if outcome else None)
        await self.publish()
        return self.record

    # -- who looks at it -----------------------------------------------------------------------------------------------

    def announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def changed(self) -> anyio.Event:
        """Set at the next change; take it before looking."""
        return self._changed

    async def publish(self) -> None:
        """Never raises: a row that cannot be written now is written with the machine's next change, at the latest by
        the next agent. The proxy notices by itself what does not answer."""
        try:
            await self._context.rows.put(self.rows())
        except PantalaError as error:
            log.exception("machine row not published", machine=self.record.id, error=str(error))

    def rows(self) -> list[Row]:
        """The machine's rows as they are now; never says ready of one that is not. None of one that is hidden."""
        record = self.record
        if record.hidden:
            return []
        health = self.health if record.state is State.STARTED else None
        passing = health.passing() if health else [False] * len(record.version.config.services or [])
        row = view.machine_row(
            record, node=self._context.node, passing=passing, ready_at_ms=health.ready_at_ms if health else 0
        )
        return [*([] if record.state in TERMINAL else view.service_rows(record)), row]

    def checks(self) -> list[CheckStatus]:
        """Empty while it does not run."""
        return self.health.statuses() if self.health else []

    def containers(self) -> list[ContainerStatus] | None:
        """How they are; None of a machine that has none."""
        given = self.record.version.config.containers
        if not given:
            return None
        if self.health is not None and self.health.contained.states:
            return containers.statuses(self.health.contained.states)
        state = "pending" if self.record.state is State.STARTED else "stopped"
        return [ContainerStatus(name=one.name, state=state) for one in given]
