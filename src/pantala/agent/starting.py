"""Steps that bring a machine up, or make one that sleeps ready to be woken by one message."""

from __future__ import annotations

from msgspec.structs import replace

from pantala.agent import outcomes, view
from pantala.agent.events import event
from pantala.agent.work import AT_ONCE, WHEN_NUDGED, Work
from pantala.domain.machine import State
from pantala.errors import DriverError, PantalaError
from pantala.journal import Desired, MachineRecord


async def start(work: Work) -> float:
    record, keeper = work.record, work.keeper
    wait_s = (record.restart_at_ms - keeper.now_ms()) / 1000
    if record.state is State.RESTARTING and wait_s > 0:
        return wait_s
    if record.state is not State.STARTING:
        at_ms = keeper.now_ms()
        source = "flyd" if record.state is State.RESTARTING else record.desired.source
        await keeper.change(
            lambda r: replace(r, state=State.STARTING, reason="", desired=replace(r.desired, restart=False)),
            events=(event("start", "starting", source, at_ms),),
            begin="start",
        )
    try:
        started = await _bring_up(work)
    except PantalaError as error:
        return await failed(work, error)
    if not started:
        return AT_ONCE
    at_ms = keeper.now_ms()
    await keeper.change(
        lambda r: outcomes.started(r, at_ms), events=(event("start", "started", "flyd", at_ms),), end=("start",)
    )
    work.watch.begin()
    await keeper.publish()
    return AT_ONCE


async def _bring_up(work: Work) -> bool:
    """Image, runtime, start message; False when another request came in between."""
    image = await work.pull()
    if image is None:
        return False
    message = await work.body.start_message(work.record, image)
    fresh = not work.is_prepared
    if fresh:
        await work.prepare(image)
    if work.record.desired.ends:
        return False
    try:
        await work.body.start(message)
    except DriverError:
        if fresh:
            raise
        # What was prepared long ago may have died since; once more with a new one.
        await work.body.clear(work.record)
        await work.prepare(image)
        await work.body.start(message)
    return True


async def failed(work: Work, error: PantalaError) -> float:
    """It did not start. The reason is in its history; nothing of it runs; it is tried again when asked."""
    reason = error.sentence()
    await work.body.clear(work.record)
    at_ms = work.keeper.now_ms()

    def settle(r: MachineRecord) -> MachineRecord:
        asked_since = r.desired.goal not in ("started", "created") or r.desired.restart
        desired = r.desired if asked_since else replace(r.desired, goal="rest")
        if r.version.config.auto_destroy and not asked_since:
            desired = Desired(goal="destroyed", source="flyd", force=True)
        return replace(r, state=State.FAILED, reason=reason, runtime="none", runtime_instance="", desired=desired)

    await work.keeper.change(
        settle, events=(event("start", "failed", "flyd", at_ms, reason=reason),), end=("start", "prepare")
    )
    await work.say(f"machine failed to start: {reason}", "error")
    return AT_ONCE


async def get_ready(work: Work) -> float:
    """A stopped machine that requests may wake is prepared again, so that its wake is one message."""
    record = work.record
    if record.state not in outcomes.READY or work.is_prepared or not view.wants_wake(record.version.config):
        return WHEN_NUDGED
    wait_s = work.prepare_again_at - work.context.clock.monotonic()
    if wait_s > 0:
        return wait_s
    try:
        image = await work.pull()
        if image is not None:
            await work.prepare(image)
    except PantalaError as error:
        reason = error.sentence()
        pause_s = work.context.pace.retry_prepare_s
        work.prepare_again_at = work.context.clock.monotonic() + pause_s
        await work.body.clear(work.record)
        at_ms = work.keeper.now_ms()
        await work.keeper.change(
            lambda r: replace(r, runtime="none", runtime_instance="", reason=reason),
            events=(event("prepare", "failed", "flyd", at_ms, reason=reason),),
            end=("prepare",),
        )
    return AT_ONCE
