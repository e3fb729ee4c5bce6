"""One task per machine. Requests are admitted by its keeper, which journals what they want; `run` looks
at what is wanted and what is, does the next thing, journals what it learnt, and looks again.

Between two looks nothing is remembered but the record, so a new agent goes on where the old one died:

    desired   ──►  look: destroy? exited? update? restart? start? stop? get ready?  ──►  one step  ──►  observed
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import structlog
from anyio.abc import TaskGroup
from msgspec.structs import replace

from pantala.agent import adoption, outcomes, view
from pantala.agent.body import Body
from pantala.agent.context import Context, ProxyLink
from pantala.agent.events import event, exit_event
from pantala.agent.health import Health
from pantala.agent.keeper import Keeper
from pantala.domain import restart
from pantala.domain.machine import TERMINAL, State, Verb
from pantala.domain.runtime import UnpackedImage
from pantala.drivers.protocol import Runtime
from pantala.errors import DriverError, PantalaError
from pantala.journal import Desired, MachineRecord, Version

log = structlog.get_logger()

AT_ONCE = 0.0
WHEN_NUDGED = math.inf


class MachineTask:
    def __init__(self, context: Context, keeper: Keeper, proxy: ProxyLink, tasks: TaskGroup) -> None:
        self.keeper = keeper
        keeper.accepted = self._accepted
        self._context = context
        self._proxy = proxy
        self._tasks = tasks
        self._body = Body(context, keeper.record.id)
        self._nudged = anyio.Event()
        self._interruptible: anyio.CancelScope | None = None
        self._images: dict[str, UnpackedImage] = {}
        self._gone: Runtime | None = None
        self._is_gone = anyio.Event()
        self._watching: anyio.CancelScope | None = None
        self._prepare_again_at = 0.0
        self._stuck_on = ""

    @property
    def record(self) -> MachineRecord:
        return self.keeper.record

    def nudge(self) -> None:
        self._nudged.set()

    async def adopt(self) -> None:
        """Make record and driver agree after another agent died at any point; what runs is left alone."""
        await adoption.adopt(self.keeper, self._body, self._context.driver)

    def _accepted(self, verb: Verb) -> None:
        """A request was admitted: whatever waits for an image, a drain or an end looks again."""
        if self._interruptible is not None and verb is not Verb.START:
            self._interruptible.cancel()
        self.nudge()

    # -- the story -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the machine is destroyed. Adoption has already made record and driver agree on what runs."""
        if self.record.state is State.STARTED:
            self._watch()
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
        self._stop_watching()

    async def _advance(self) -> float:
        """Do the next thing; the seconds after which to look again without being nudged."""
        record = self.record
        wanted = record.desired
        if wanted.ends or record.state is State.DESTROYING:
            return await self._destroy()
        if record.state is State.STARTED and self._is_gone.is_set():
            return await self._exited()
        if record.state is State.STOPPING:
            return await self._finish_stop()
        if record.next_version is not None or record.state is State.UPDATING:
            return await self._update()
        if record.state is State.STARTED:
            if wanted.goal == "stopped" or wanted.restart:
                return await self._stop()
            return WHEN_NUDGED
        if wanted.goal == "started" or wanted.restart:
            return await self._start()
        if wanted.goal in ("stopped", "created") and record.state is not State.STOPPED:
            return await self._rest()
        return await self._get_ready()

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

    # -- starting ------------------------------------------------------------------------------------------------------

    async def _start(self) -> float:
        record = self.record
        wait_s = (record.restart_at_ms - self.keeper.now_ms()) / 1000
        if record.state is State.RESTARTING and wait_s > 0:
            return wait_s
        if record.state is not State.STARTING:
            at_ms = self.keeper.now_ms()
            source = "flyd" if record.state is State.RESTARTING else record.desired.source
            await self.keeper.change(
                lambda r: replace(r, state=State.STARTING, reason="", desired=replace(r.desired, restart=False)),
                events=(event("start", "starting", source, at_ms),),
                begin="start",
            )
        try:
            started = await self._bring_up()
        except PantalaError as error:
            return await self._failed(error)
        if not started:
            return AT_ONCE
        at_ms = self.keeper.now_ms()
        self._is_gone = anyio.Event()
        await self.keeper.change(
            lambda r: outcomes.started(r, at_ms), events=(event("start", "started", "flyd", at_ms),), end=("start",)
        )
        self._watch()
        await self.keeper.publish()
        return AT_ONCE

    async def _bring_up(self) -> bool:
        """Image, runtime, start message; False when another request came in between."""
        image = await self._pull()
        if image is None:
            return False
        message = await self._body.start_message(self.record, image)
        fresh = not self._is_prepared()
        if fresh:
            await self._prepare(image)
        if self.record.desired.ends:
            return False
        try:
            await self._body.start(message)
        except DriverError:
            if fresh:
                raise
            # What was prepared long ago may have died since; once more with a new one.
            await self._body.clear(self.record)
            await self._prepare(image)
            await self._body.start(message)
        return True

    async def _pull(self, version: Version | None = None) -> UnpackedImage | None:
        """The image; None when another request interrupted the wait for it."""
        version = version or self.record.version
        known = self._images.get(version.instance_id)
        if known is None:
            with self._interruptibly():
                known = await self._body.pull(version)
                self._images = {version.instance_id: known}
        return known

    @contextmanager
    def _interruptibly(self) -> Generator[anyio.CancelScope]:
        """A wait that a newly admitted request ends, so that the machine looks again."""
        with anyio.CancelScope() as scope:
            self._interruptible = scope
            try:
                yield scope
            finally:
                self._interruptible = None

    def _is_prepared(self) -> bool:
        record = self.record
        return record.runtime == "prepared" and record.runtime_instance == record.version.instance_id

    async def _prepare(self, image: UnpackedImage) -> None:
        await self.keeper.change(lambda r: replace(r, network=True, runtime="none"), begin="prepare")
        await self._body.prepare(self.record, image)
        await self.keeper.change(
            lambda r: replace(r, runtime="prepared", runtime_instance=r.version.instance_id), end=("prepare",)
        )

    async def _failed(self, error: PantalaError) -> float:
        """It did not start. The reason is in its history; nothing of it runs; it is tried again when asked."""
        reason = error.sentence()
        await self._body.clear(self.record)
        at_ms = self.keeper.now_ms()

        def settle(r: MachineRecord) -> MachineRecord:
            asked_since = r.desired.goal not in ("started", "created") or r.desired.restart
            desired = r.desired if asked_since else replace(r.desired, goal="rest")
            if r.version.config.auto_destroy and not asked_since:
                desired = Desired(goal="destroyed", source="flyd", force=True)
            return replace(r, state=State.FAILED, reason=reason, runtime="none", runtime_instance="", desired=desired)

        await self.keeper.change(
            settle, events=(event("start", "failed", "flyd", at_ms, reason=reason),), end=("start", "prepare")
        )
        await self._say(f"machine failed to start: {reason}", "error")
        return AT_ONCE

    # -- running -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Follow the running app: its end, its health, its words."""
        self._stop_watching()
        self._is_gone = anyio.Event()
        self._watching = anyio.CancelScope()
        self.keeper.health = Health(
            self._context,
            self.record,
            changed=self._health_changed,
            became_ready=self._tell_ready,
            answered=self._tell_answered,
            explain=self._explain_address,
        )
        self._tasks.start_soon(self._follow, self._watching, self._is_gone, self.keeper.health)

    async def _follow(self, scope: anyio.CancelScope, is_gone: anyio.Event, health: Health) -> None:
        with scope:
            async with anyio.create_task_group() as tasks:
                health.start(tasks)
                tasks.start_soon(self._listen)
                self._gone = await self._body.gone()
                is_gone.set()
                self.nudge()
                tasks.cancel_scope.cancel()

    async def _listen(self) -> None:
        record = self.record
        pause_s = self._context.pace.log_poll_s
        while True:
            await self._context.logs.collect(
                app=record.app.name, machine_id=record.id, instance_id=record.version.instance_id
            )
            await self._context.clock.sleep(pause_s)

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        self.keeper.health = None

    async def _health_changed(self) -> None:
        await self.keeper.publish()
        self.keeper.announce()

    async def _tell_ready(self, at_ms: int) -> None:
        """For those who watch a deploy; no request waits for this write."""
        await self.keeper.change(lambda r: r, events=(event("ready", "started", "flyd", at_ms),))

    async def _tell_answered(self, sentence: str) -> None:
        at_ms, instance_id = self.keeper.now_ms(), self.record.version.instance_id
        await self.keeper.change(
            lambda r: replace(r, answered_instance=instance_id),
            events=(event("answer", "answered", "flyd", at_ms, reason=sentence),),
        )

    async def _explain_address(self, sentence: str) -> None:
        at_ms = self.keeper.now_ms()
        await self.keeper.change(
            lambda r: replace(r, reason=sentence) if r.state is State.STARTED else r,
            events=(event("listen", "wrong_address", "flyd", at_ms, reason=sentence),),
        )
        await self._say(sentence, "warning")

    async def _exited(self) -> float:
        """The app ended by itself (or was told to by a stop whose agent died)."""
        record, runtime = self.record, self._gone
        code = runtime.exit.exit_code if runtime and runtime.exit else 137
        requested = record.stop_requested or bool(runtime and runtime.exit and runtime.exit.requested_stop)
        at_ms = self.keeper.now_ms()
        verdict = restart.after_exit(
            record.version.config.restart,
            exit_code=code,
            requested=requested,
            restarts_ms=record.restarts_ms,
            now_ms=at_ms,
        )
        again = isinstance(verdict, restart.Again) and record.desired.goal == "started"
        if again and isinstance(verdict, restart.Again):
            count, reason = verdict.count, f"exited with code {code}"
            restart_at_ms = at_ms + int(verdict.delay_s * 1000 * self._context.pace.restart_scale)
        else:
            count, restart_at_ms = len(record.restarts_ms), 0
            reason = verdict.reason if isinstance(verdict, restart.Stay) else f"exited with code {code}"

        def settle(r: MachineRecord) -> MachineRecord:
            if again:
                kept = tuple(m for m in r.restarts_ms if at_ms - m < restart.WINDOW_S * 1000)
                return replace(
                    r, state=State.RESTARTING, reason=reason, restart_at_ms=restart_at_ms, restarts_ms=(*kept, at_ms)
                )
            return outcomes.at_rest(replace(r, state=State.STOPPED, reason=reason, stop_requested=False))

        self._stop_watching()
        shown = exit_event(runtime, at_ms, requested=requested, restarting=again, restart_count=count, reason=reason)
        await self.keeper.change(settle, events=(shown,), begin="clear")
        await self._say(outcomes.exit_sentence(runtime, reason), "info" if code == 0 else "warning")
        return await self._cleared()

    async def _cleared(self) -> float:
        await self._body.clear(self.record)
        await self.keeper.change(lambda r: replace(r, runtime="none", runtime_instance=""), end=("clear",))
        return AT_ONCE

    # -- stopping ------------------------------------------------------------------------------------------------------

    async def _stop(self) -> float:
        """Drain, then ask the app to end. A start that came meanwhile is done after it."""
        wanted = self.record.desired
        if not wanted.force:
            await self._drain()
        again = self.record.desired
        if again.goal == "started" and not again.restart:
            await self._proxy.undrain(self.record.id)
            return AT_ONCE
        if self._is_gone.is_set() or again.ends:
            return AT_ONCE
        at_ms = self.keeper.now_ms()
        restarting = again.restart
        kind, status = ("restart", "restarting") if restarting else ("stop", "stopping")
        await self.keeper.change(
            lambda r: replace(r, state=State.STOPPING, reason="", stop_requested=True),
            events=(event(kind, status, again.source, at_ms),),
            begin="stop",
        )
        return await self._finish_stop()

    async def _drain(self) -> None:
        with self._interruptibly():
            await self._proxy.drain(self.record.id, deadline_s=self._context.pace.drain_s)

    async def _finish_stop(self) -> float:
        runtime = await self._end_app()
        at_ms = self.keeper.now_ms()
        await self._body.clear(self.record)
        shown = exit_event(
            runtime, at_ms, requested=True, restarting=self.record.desired.restart, restart_count=0, reason=""
        )

        def settle(r: MachineRecord) -> MachineRecord:
            stopped = replace(
                r, state=State.STOPPED, reason="", runtime="none", runtime_instance="", stop_requested=False
            )
            wanted = stopped.desired
            if wanted.restart or wanted.goal == "started":
                return replace(stopped, restarts_ms=())
            return outcomes.at_rest(stopped)

        await self.keeper.change(settle, events=(shown,), end=("stop",))
        await self._say(outcomes.exit_sentence(runtime, "stopped on request"), "info")
        return AT_ONCE

    async def _end_app(self) -> Runtime | None:
        """Ask the app to end and wait for it, at most its grace and a little; the caller clears what is left."""
        if self._watching is None:
            self._watch()
        image = self._images.get(self.record.version.instance_id)
        overdue_at = anyio.current_time() + await self._body.ask_to_stop(self.record, image)
        while not self._is_gone.is_set() and anyio.current_time() < overdue_at:
            with self._interruptibly(), anyio.move_on_at(overdue_at):
                await self._is_gone.wait()
            if self.record.desired.force:
                break
        if not self._is_gone.is_set():
            at_ms = self.keeper.now_ms()
            await self.keeper.change(
                lambda r: r, events=(event("stop", "killed", "flyd", at_ms, reason="it did not end in time"),)
            )
        runtime = self._gone if self._is_gone.is_set() else None
        self._stop_watching()
        return runtime

    async def _rest(self) -> float:
        """Nothing runs and nothing should: created, failed or interrupted machines settle as stopped."""
        record = self.record
        if record.desired.goal == "created":
            try:
                if await self._pull() is None:
                    return AT_ONCE
            except PantalaError as error:
                return await self._failed(error)
        if record.runtime != "none" or record.state in (State.STARTING, State.RESTARTING):
            await self._body.clear(record)
        await self.keeper.change(
            lambda r: outcomes.settled(
                replace(r, state=State.STOPPED, reason="", runtime="none", runtime_instance="", restarts_ms=())
            ),
            end=("start", "prepare", "clear"),
        )
        return AT_ONCE

    async def _get_ready(self) -> float:
        """A stopped machine that requests may wake is prepared again, so that its wake is one message."""
        record = self.record
        if record.state not in outcomes.READY or self._is_prepared() or not view.wants_wake(record.version.config):
            return WHEN_NUDGED
        wait_s = self._prepare_again_at - self._context.clock.monotonic()
        if wait_s > 0:
            return wait_s
        try:
            image = await self._pull()
            if image is not None:
                await self._prepare(image)
        except PantalaError as error:
            reason = error.sentence()
            pause_s = self._context.pace.retry_prepare_s
            self._prepare_again_at = self._context.clock.monotonic() + pause_s
            await self._body.clear(self.record)
            at_ms = self.keeper.now_ms()
            await self.keeper.change(
                lambda r: replace(r, runtime="none", runtime_instance="", reason=reason),
                events=(event("prepare", "failed", "flyd", at_ms, reason=reason),),
                end=("prepare",),
            )
        return AT_ONCE

    # -- updating ------------------------------------------------------------------------------------------------------

    async def _update(self) -> float:
        """Fetch the new image first, then drain, stop, exchange the version and go where it should be."""
        record = self.record
        coming = record.next_version
        if record.state is not State.UPDATING and coming is not None:
            try:
                image = await self._pull(coming)
            except PantalaError as error:
                return await self._update_failed(coming.instance_id, error)
            if record.state is State.STARTED:
                await self._drain()
            if image is None or self.record.next_version != coming or self.record.desired.ends:
                return AT_ONCE
            at_ms = self.keeper.now_ms()
            await self.keeper.change(
                lambda r: replace(r, state=State.UPDATING, reason="", stop_requested=True),
                events=(event("update", "updating", record.desired.source, at_ms),),
                begin="update",
            )
        return await self._exchange()

    async def _exchange(self) -> float:
        record = self.record
        ended: tuple[Runtime | None, ...] = ()
        if record.runtime == "running":
            ended = (await self._end_app(),)
        await self._body.clear(self.record)
        at_ms = self.keeper.now_ms()
        runs = record.desired.goal == "started"

        def exchanged(r: MachineRecord) -> MachineRecord:
            return replace(
                r,
                version=r.next_version or r.version,
                next_version=None,
                state=State.STOPPED,
                reason="",
                runtime="none",
                runtime_instance="",
                stop_requested=False,
                restarts_ms=(),
                desired=replace(r.desired, restart=False),
            )

        await self.keeper.change(
            exchanged,
            events=(
                *(
                    exit_event(runtime, at_ms, requested=True, restarting=runs, restart_count=0, reason="updated")
                    for runtime in ended
                ),
                event("update", "updated", "flyd", at_ms),
            ),
            end=("update", "start", "prepare", "clear"),
        )
        return AT_ONCE

    async def _update_failed(self, instance_id: str, error: PantalaError) -> float:
        """The old version goes on; its history says why the new one did not come."""
        at_ms = self.keeper.now_ms()
        reason = f"version {instance_id} did not come: {error.sentence()}"

        def keep(r: MachineRecord) -> MachineRecord:
            gave_up = r.next_version is not None and r.next_version.instance_id == instance_id
            return replace(r, next_version=None if gave_up else r.next_version, reason=reason)

        await self.keeper.change(keep, events=(event("update", "failed", "flyd", at_ms, reason=reason),))
        await self._say(f"machine was not updated: {reason}", "error")
        return AT_ONCE

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _destroy(self) -> float:
        migrated = self.record.desired.goal == "migrated"
        if migrated and self.record.state is State.STARTED:
            await self._hand_over()
        record = self.record
        if record.state is not State.DESTROYING:
            at_ms = self.keeper.now_ms()
            await self.keeper.change(
                lambda r: replace(r, state=State.DESTROYING, reason=""),
                events=(event("destroy", "destroying", record.desired.source, at_ms),),
                begin="destroy",
            )
        ended: tuple[Runtime | None, ...] = ()
        why, last = ("placed on another host", State.MIGRATED) if migrated else ("destroyed", State.DESTROYED)
        if record.runtime == "running":
            ended = (await self._end_app(),)
        self._stop_watching()
        await self._body.clear(self.record)
        await self._body.leave_network()
        at_ms = self.keeper.now_ms()
        await self.keeper.change(
            lambda r: replace(
                r,
                state=last,
                runtime="none",
                runtime_instance="",
                network=False,
                next_version=None,
                lease=None,
                destroyed_at_ms=at_ms,
            ),
            events=(
                *(
                    exit_event(runtime, at_ms, requested=True, restarting=False, restart_count=0, reason=why)
                    for runtime in ended
                ),
                event("migrate" if migrated else "destroy", str(last), "flyd", at_ms),
            ),
            end=("destroy", "start", "prepare", "clear", "stop", "update"),
        )
        return AT_ONCE

    async def _hand_over(self) -> None:
        """The copy elsewhere is shown already: what other hosts still send here, because they have not heard yet, is
        served; then the rest is drained."""
        await self._context.clock.sleep(self._context.pace.hand_over_s)
        await self._drain()

    async def _say(self, message: str, level: str) -> None:
        await self._context.logs.platform_line(
            app=self.record.app.name, machine_id=self.record.id, message=message, level=level
        )
