"""Steps that bring a machine up, or make one that sleeps ready to be woken by one message."""

from __future__ import annotations

import anyio
from msgspec.structs import replace

from pantala.agent import outcomes, view
from pantala.agent.events import event
from pantala.agent.work import AT_ONCE, WHEN_NUDGED, Work
from pantala.domain.machine import State
from pantala.errors import DriverError, InvalidRequest, NotFound, PantalaError, TransientError
from pantala.journal import Desired, MachineRecord

READY_FIRST_S = 0.02
"""What was resumed accepts at once, or takes longer than anybody should wait for the news that it runs."""
RESUME = "resume"
"""The reason of starts that continued a suspended machine."""


async def start(work: Work) -> float:
    record, keeper = work.record, work.keeper
    wait_s = (record.restart_at_ms - keeper.now_ms()) / 1000
    if record.state is State.RESTARTING and wait_s > 0:
        return wait_s
    if record.state is not State.STARTING:
        at_ms = keeper.now_ms()
        source = "flyd" if record.state is State.RESTARTING else record.desired.source
        how = RESUME if record.state is State.SUSPENDED else ""
        await keeper.change(
            lambda r: replace(r, state=State.STARTING, reason="", desired=replace(r.desired, restart=False)),
            events=(event("start", "starting", source, at_ms, reason=how),),
            begin="start",
            in_haste=True,  # that it is to start is on disk; what this begins ends with the power
        )
    if work.record.runtime == "suspended" and await _resume(work):
        return AT_ONCE
    try:
        started = await _bring_up(work)
    except PantalaError as error:
        return await failed(work, error)
    if not started:
        return AT_ONCE
    # Its ports are asked while this is written: a request that waits for it waits for no more writes.
    at_ms = keeper.now_ms()
    work.watch.begin()
    await keeper.change(
        lambda r: outcomes.started(r, at_ms), events=(event("start", "started", "flyd", at_ms),), end=("start",)
    )
    return AT_ONCE


async def _resume(work: Work) -> bool:
    """It goes on where it was: no image, no message. Its ports are asked before this is written, so that a request that
    waits for it waits for one write only, that of the step, and beside none. False when it has to boot."""
    try:
        await work.body.resume()
    except PantalaError as error:
        reason = f"not resumed: {error.sentence()}; it boots instead"
        work.watch.end()
        await work.body.clear(work.record)
        at_ms = work.keeper.now_ms()
        await work.keeper.change(
            lambda r: replace(r, runtime="none", runtime_instance=""),
            events=(event("start", "starting", "flyd", at_ms, reason=reason),),
        )
        return False
    at_ms = work.keeper.now_ms()
    work.watch.begin()
    if (health := work.keeper.health) is not None:
        with anyio.move_on_after(READY_FIRST_S):
            await health.ready.wait()
    await work.keeper.change(
        lambda r: outcomes.started(r, at_ms),
        events=(event("start", "started", "flyd", at_ms, reason=RESUME),),
        end=("start",),
    )
    return True


async def _bring_up(work: Work) -> bool:
    """Image, runtime, start message; False when another request came in between."""
    image = await work.pull()
    if image is None:
        return False
    if not await _secrets_are_here(work):
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


async def _secrets_are_here(work: Work) -> bool:
    """Secrets come to a host by another road than machines. A version that may not run with older ones waits for them
    a while; False when another request came in between."""
    wanted, pace, clock = work.record.version.min_secrets_version, work.context.pace, work.context.clock
    give_up_at = clock.monotonic() + pace.secrets_s
    told = False
    while wanted > 0:
        sealed = await work.context.journal.secrets(work.record.app.name)
        have = sealed.version if sealed else 0
        if have >= wanted:
            break
        lacks = f"secrets version {wanted} has not reached this host (it has {have or 'none'})"
        if clock.monotonic() >= give_up_at:
            raise TransientError(f"{lacks} within {pace.secrets_s:g} s")
        if not told:
            told = True
            await _tell_waiting(work, lacks)
        with work.interruptibly() as scope:
            await clock.sleep(pace.secrets_poll_s)
        if scope.cancelled_caught:
            return False
    return True


async def _tell_waiting(work: Work, lacks: str) -> None:
    await work.keeper.change(lambda r: replace(r, reason=f"waits: {lacks}"))


async def failed(work: Work, error: PantalaError) -> float:
    """It did not start. The reason is in its history; nothing of it runs; it is tried again when asked. One that never
    ran and never will is cleaned up after a while, unless it gets another version."""
    reason = error.sentence()
    hopeless = work.record.state is State.STARTING and not work.record.started_at_ms and _never_starts(error)
    last = State.LAUNCH_FAILED if hopeless else State.FAILED
    work.watch.end()
    await work.body.clear(work.record)
    at_ms = work.keeper.now_ms()

    def settle(r: MachineRecord) -> MachineRecord:
        asked_since = r.desired.goal not in ("started", "created", "suspended") or r.desired.restart
        desired = r.desired if asked_since else replace(r.desired, goal="rest")
        if r.version.config.auto_destroy and not asked_since:
            desired = Desired(goal="destroyed", source="flyd", force=True)
        down = replace(r, state=last, reason=reason, runtime="none", runtime_instance="", desired=desired)
        return outcomes.run_ended(down, f"it did not start: {reason}")

    status = "launch_failed" if hopeless else "failed"
    await work.keeper.change(
        settle, events=(event("start", status, "flyd", at_ms, reason=reason),), end=("start", "prepare")
    )
    await work.say(f"machine failed to start: {reason}", "error")
    return AT_ONCE


def _never_starts(error: PantalaError) -> bool:
    """No image of that name, one that cannot be a machine, or a command that is not in it."""
    return isinstance(error, NotFound | InvalidRequest) or (isinstance(error, DriverError) and error.guest_fault)


async def clean_up(work: Work) -> float:
    """A machine that never came up is kept for its owner to look at, then destroyed."""
    kept_s = work.context.pace.launch_failed_kept_s
    wait_s = kept_s - (work.keeper.now_ms() - work.record.state_since_ms) / 1000
    if wait_s > 0:
        return wait_s
    at_ms, why = work.keeper.now_ms(), f"its launch failed {kept_s:g} s ago and nothing was done about it"
    await work.keeper.change(
        lambda r: replace(r, desired=Desired(goal="destroyed", source="flyd", force=True)),
        events=(event("destroy", "cleaning_up", "flyd", at_ms, reason=why),),
    )
    return AT_ONCE


async def get_ready(work: Work) -> float:
    """A stopped machine that requests may wake is prepared again, so that its wake is one message."""
    record = work.record
    if record.state not in outcomes.READY or work.is_prepared or not view.wants_wake(record.version.config):
        return WHEN_NUDGED
    wait_s = work.prepare_again_at - work.context.clock.monotonic()
    if wait_s > 0:
        return wait_s
    # Hundreds may have been made or stopped at once: they take turns, and leave the host to those who are asked for.
    with work.interruptibly(by_start=True) as scope:
        await work.context.preparing.acquire()
    if scope.cancelled_caught:
        return AT_ONCE
    try:
        return await _prepare_ahead(work)
    finally:
        work.context.preparing.release()


async def _prepare_ahead(work: Work) -> float:
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
