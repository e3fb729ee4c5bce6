"""Steps that put a running machine to sleep with its memory. Waking it is a start (`agent/starting.py`).

started ──► drained ──► suspending ──► frozen by the driver ──► suspended
                            └── it cannot be frozen: stopping
"""

from __future__ import annotations

from msgspec.structs import replace

from pantala.agent import outcomes
from pantala.agent.events import event
from pantala.agent.work import AT_ONCE, Work
from pantala.domain.machine import State
from pantala.errors import PantalaError
from pantala.journal import MachineRecord


async def suspend(work: Work) -> float:
    """Drain first: what is under way ends before its machine sleeps."""
    await work.drain()
    again = work.record.desired
    if again.goal == "started":
        await work.proxy.undrain(work.record.id)
        return AT_ONCE
    if again.goal != "suspended" or work.record.next_version is not None or work.watch.is_gone.is_set():
        return AT_ONCE
    at_ms = work.keeper.now_ms()
    await work.keeper.change(
        lambda r: replace(r, state=State.SUSPENDING, reason=""),
        events=(event("suspend", "suspending", again.source, at_ms),),
        begin="suspend",
    )
    return await finish(work)


async def finish(work: Work) -> float:
    try:
        await work.body.suspend()
    except PantalaError as error:
        return await _stop_instead(work, error)
    work.watch.doze()
    at_ms = work.keeper.now_ms()

    def asleep(r: MachineRecord) -> MachineRecord:
        suspended = replace(r, state=State.SUSPENDED, runtime="suspended")
        return outcomes.settled(suspended) if r.desired.goal == "suspended" else suspended

    await work.keeper.change(
        asleep,
        events=(event("suspend", "suspended", "flyd", at_ms),),
        end=("suspend",),
    )
    return AT_ONCE


async def _stop_instead(work: Work, error: PantalaError) -> float:
    """It was to sleep, so it sleeps; it will boot instead of going on."""
    at_ms, reason = work.keeper.now_ms(), f"not suspended: {error.sentence()}; stopped instead"

    def stopping(r: MachineRecord) -> MachineRecord:
        goal = "stopped" if r.desired.goal == "suspended" else r.desired.goal
        return replace(
            r, state=State.STOPPING, reason=reason, stop_requested=True, desired=replace(r.desired, goal=goal)
        )

    await work.keeper.change(
        stopping, events=(event("suspend", "failed", "flyd", at_ms, reason=reason),), begin="stop", end=("suspend",)
    )
    return AT_ONCE


async def lost(work: Work) -> float:
    """Its processes were killed while it slept."""
    work.watch.end()
    await work.body.clear(work.record)
    at_ms = work.keeper.now_ms()
    await work.keeper.change(
        outcomes.lost, events=(event("suspend", "lost", "flyd", at_ms, reason=outcomes.LOST),), end=("suspend",)
    )
    return AT_ONCE


async def settle(work: Work) -> float:
    """A request that has become pointless: the machine was stopped or updated since, or never came up."""
    await work.keeper.change(outcomes.settled)
    return AT_ONCE
