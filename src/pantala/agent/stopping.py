"""Steps at whose end nothing of a machine runs: a stop that was asked for, an end by itself, coming to rest."""

from __future__ import annotations

import anyio
from msgspec.structs import replace

from pantala.agent import outcomes, starting
from pantala.agent.events import event, exit_event
from pantala.agent.work import AT_ONCE, Work
from pantala.domain import restart
from pantala.domain.machine import State
from pantala.drivers.protocol import Runtime
from pantala.errors import PantalaError
from pantala.journal import MachineRecord


async def stop(work: Work) -> float:
    """Drain, then ask the app to end. A start that came meanwhile is done after it."""
    wanted = work.record.desired
    if not wanted.force:
        await work.drain()
    again = work.record.desired
    if again.goal == "started" and not again.restart:
        await work.proxy.undrain(work.record.id)
        return AT_ONCE
    if work.watch.is_gone.is_set() or again.ends:
        return AT_ONCE
    at_ms = work.keeper.now_ms()
    restarting = again.restart
    kind, status = ("restart", "restarting") if restarting else ("stop", "stopping")
    await work.keeper.change(
        lambda r: replace(r, state=State.STOPPING, reason="", stop_requested=True),
        events=(event(kind, status, again.source, at_ms),),
        begin="stop",
    )
    return await finish(work)


async def drop(work: Work) -> float:
    """A suspended machine is to be stopped: what it holds in memory goes, its app is not asked."""
    at_ms = work.keeper.now_ms()
    await work.keeper.change(
        lambda r: replace(r, state=State.STOPPING, reason=""),
        events=(event("stop", "stopping", work.record.desired.source, at_ms),),
        begin="stop",
    )
    return await finish(work)


async def _finish_drop(work: Work) -> float:
    work.watch.end()
    await work.body.clear(work.record)
    at_ms, reason = work.keeper.now_ms(), "what it held in memory was dropped"

    def settle(r: MachineRecord) -> MachineRecord:
        stopped = replace(r, state=State.STOPPED, reason="", runtime="none", runtime_instance="", stop_requested=False)
        return stopped if stopped.desired.goal == "started" else outcomes.at_rest(stopped)

    await work.keeper.change(settle, events=(event("stop", "stopped", "flyd", at_ms, reason=reason),), end=("stop",))
    return AT_ONCE


async def finish(work: Work) -> float:
    if work.record.runtime == "suspended":
        return await _finish_drop(work)
    runtime = await end_app(work)
    at_ms = work.keeper.now_ms()
    await work.body.clear(work.record)
    shown = exit_event(
        runtime, at_ms, requested=True, restarting=work.record.desired.restart, restart_count=0, reason=""
    )

    def settle(r: MachineRecord) -> MachineRecord:
        stopped = replace(r, state=State.STOPPED, reason="", runtime="none", runtime_instance="", stop_requested=False)
        wanted = stopped.desired
        if wanted.restart or wanted.goal == "started":
            return replace(stopped, restarts_ms=())
        return outcomes.run_ended(outcomes.at_rest(stopped), "stopped on request")

    await work.keeper.change(settle, events=(shown,), end=("stop",))
    await work.say(outcomes.exit_sentence(runtime, "stopped on request"), "info")
    return AT_ONCE


async def end_app(work: Work) -> Runtime | None:
    """Ask the app to end and wait for it, at most its grace and a little; the caller clears what is left."""
    if not work.watch.is_on:
        work.watch.begin()
    image = work.images.get(work.record.version.instance_id)
    overdue_at = anyio.current_time() + await work.body.ask_to_stop(work.record, image)
    while not work.watch.is_gone.is_set() and anyio.current_time() < overdue_at:
        with work.interruptibly(), anyio.move_on_at(overdue_at):
            await work.watch.is_gone.wait()
        if work.record.desired.force:
            break
    if not work.watch.is_gone.is_set():
        at_ms = work.keeper.now_ms()
        await work.keeper.change(
            lambda r: r, events=(event("stop", "killed", "flyd", at_ms, reason="it did not end in time"),)
        )
    runtime = work.watch.gone if work.watch.is_gone.is_set() else None
    work.watch.end()
    return runtime


async def exited(work: Work) -> float:
    """The app ended by itself (or was told to by a stop whose agent died)."""
    record, runtime = work.record, work.watch.gone
    code = runtime.exit.exit_code if runtime and runtime.exit else 137
    requested = record.stop_requested or bool(runtime and runtime.exit and runtime.exit.requested_stop)
    at_ms = work.keeper.now_ms()
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
        restart_at_ms = at_ms + int(verdict.delay_s * 1000 * work.context.pace.restart_scale)
    else:
        count, restart_at_ms = len(record.restarts_ms), 0
        reason = verdict.reason if isinstance(verdict, restart.Stay) else f"exited with code {code}"

    def settle(r: MachineRecord) -> MachineRecord:
        if again:
            kept = tuple(m for m in r.restarts_ms if at_ms - m < restart.WINDOW_S * 1000)
            return replace(
                r, state=State.RESTARTING, reason=reason, restart_at_ms=restart_at_ms, restarts_ms=(*kept, at_ms)
            )
        rested = outcomes.at_rest(replace(r, state=State.STOPPED, reason=reason, stop_requested=False))
        return outcomes.run_ended(rested, reason)

    work.watch.end()
    shown = exit_event(runtime, at_ms, requested=requested, restarting=again, restart_count=count, reason=reason)
    await work.keeper.change(settle, events=(shown,), begin="clear")
    await work.say(outcomes.exit_sentence(runtime, reason), "info" if code == 0 else "warning")
    await work.body.clear(work.record)
    await work.keeper.change(lambda r: replace(r, runtime="none", runtime_instance=""), end=("clear", "suspend"))
    return AT_ONCE


async def rest(work: Work) -> float:
    """Nothing runs and nothing should: created, failed or interrupted machines settle as stopped."""
    record = work.record
    if record.desired.goal == "created":
        try:
            if await work.pull() is None:
                return AT_ONCE
        except PantalaError as error:
            return await starting.failed(work, error)
    if record.runtime != "none" or record.state in (State.STARTING, State.RESTARTING):
        await work.body.clear(record)
    await work.keeper.change(
        lambda r: outcomes.settled(
            replace(r, state=State.STOPPED, reason="", runtime="none", runtime_instance="", restarts_ms=())
        ),
        end=("start", "prepare", "clear"),
    )
    return AT_ONCE
