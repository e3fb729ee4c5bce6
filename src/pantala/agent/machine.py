"""One task per machine. Requests are admitted by its keeper, which journals what they want; `run` looks
at what is wanted and what is, does the next thing, journals what it learnt, and looks again.

Between two looks nothing is remembered but the record, so a new agent goes on where the old one died:

    desired   ──►  look: destroy? exited? update? restart? start? stop? suspend? ready?  ──►  one step  ──►  observed

The steps are in `starting.py`, `stopping.py`, `suspending.py`, `updating.py` and `destroying.py`.
"""

from __future__ import annotations

import anyio
import structlog
from anyio.abc import TaskGroup
from msgspec.structs import replace

from pantala.agent import adoption, destroying, starting, stopping, suspending, updating
from pantala.agent.context import Callers, Context, ProxyLink
from pantala.agent.events import event
from pantala.agent.keeper import Keeper
from pantala.agent.work import WHEN_NUDGED, Work
from pantala.domain.machine import TERMINAL, State, Verb
from pantala.errors import PantalaError
from pantala.journal import MachineRecord

log = structlog.get_logger()


class MachineTask:
    def __init__(self, context: Context, keeper: Keeper, proxy: ProxyLink, tasks: TaskGroup, callers: Callers) -> None:
        self.keeper = keeper
        keeper.accepted = self._accepted
        self._context = context
        self._nudged = anyio.Event()
        self._work = Work(context, keeper, proxy, tasks, callers=callers, nudge=self.nudge)
        self._stuck_on = ""

    @property
    def record(self) -> MachineRecord:
        return self.keeper.record

    @property
    def doing(self) -> str:
        """What its step waits for; empty between steps."""
        return self._work.body.doing

    def nudge(self) -> None:
        self._nudged.set()

    async def adopt(self) -> None:
        """Make record and driver agree after another agent died at any point; what runs is left alone."""
        await adoption.adopt(self.keeper, self._work.body, self._context.driver)

    def _accepted(self, verb: Verb) -> None:
        self._work.accepted(verb)
        self.nudge()

    async def run(self) -> None:
        """Until the machine is destroyed. Adoption has already made record and driver agree on what runs."""
        if self.record.state in (State.STARTED, State.SUSPENDING, State.SUSPENDED):
            self._work.watch.begin(asleep=self.record.state is not State.STARTED)
        await self.keeper.publish()
        while self.record.state not in TERMINAL:
            self._nudged = anyio.Event()
            try:
                pause_s = await self._advance()
            except Exception as error:  # noqa: BLE001  # the top of a loop: one machine's trouble stops no other
                pause_s = await self._stuck(error)
            if pause_s > 0:
                with anyio.move_on_after(pause_s):
                    await self._nudged.wait()
        self._work.watch.end()

    async def _advance(self) -> float:
        """Do the next thing; the seconds after which to look again without being nudged."""
        record, work = self.record, self._work
        wanted = record.desired
        if wanted.ends or record.state is State.DESTROYING:
            return await destroying.destroy(work)
        if work.watch.is_gone.is_set():
            if record.state in (State.STARTED, State.SUSPENDING):
                return await stopping.exited(work)
            if record.state is State.SUSPENDED:
                return await suspending.lost(work)
        if record.state is State.STOPPING:
            return await stopping.finish(work)
        if record.state is State.SUSPENDING:
            return await suspending.finish(work)
        if record.next_version is not None or record.state is State.UPDATING:
            return await updating.update(work)
        if record.state is State.STARTED:
            if wanted.goal == "stopped" or wanted.restart:
                return await stopping.stop(work)
            if wanted.goal == "suspended":
                return await suspending.suspend(work)
            return WHEN_NUDGED
        if wanted.goal == "started" or wanted.restart or _is_on_its_way_up(record):
            return await starting.start(work)
        if record.state is State.SUSPENDED and wanted.goal == "stopped":
            return await stopping.drop(work)
        if _is_pointless(record):
            return await suspending.settle(work)
        if record.state is State.LAUNCH_FAILED and wanted.goal == "rest":
            return await starting.clean_up(work)
        if wanted.goal in ("stopped", "created", "suspended") and record.state is not State.STOPPED:
            return await stopping.rest(work)
        return await starting.get_ready(work)

    async def _stuck(self, error: Exception) -> float:
        """Something that has no place in the story: say so in the machine's history, try again later."""
        log.exception("machine step failed", machine=self.record.id, state=str(self.record.state), exc_info=error)
        reason = error.sentence() if isinstance(error, PantalaError) else "the host failed; its log says how"
        if reason != self._stuck_on:
            at_ms = self.keeper.now_ms()
            try:
                await self.keeper.change(
                    lambda r: replace(r, reason=reason),
                    events=(event("stuck", str(self.record.state), "flyd", at_ms, reason=reason),),
                )
                self._stuck_on = reason
            except PantalaError as refused:
                log.warning("the journal takes nothing", machine=self.record.id, error=str(refused))
        return self._context.pace.retry_prepare_s


def _is_pointless(record: MachineRecord) -> bool:
    """Nothing has to be done to have what was asked for."""
    match record.desired.goal:
        case "suspended":
            return record.state in (State.STOPPED, State.SUSPENDED, State.LAUNCH_FAILED)
        case "stopped":
            return record.state is State.LAUNCH_FAILED
        case _:
            return False


def _is_on_its_way_up(record: MachineRecord) -> bool:
    """It is to be suspended once it runs."""
    return record.desired.goal == "suspended" and record.state in (State.STARTING, State.RESTARTING)
