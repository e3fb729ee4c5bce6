"""The end of a machine on this host: destroyed, or placed on another one."""

from __future__ import annotations

from msgspec.structs import replace

from pantala.agent import stopping
from pantala.agent.events import event, exit_event
from pantala.agent.work import AT_ONCE, Work
from pantala.domain.machine import State
from pantala.drivers.protocol import Runtime


async def destroy(work: Work) -> float:
    migrated = work.record.desired.goal == "migrated"
    if migrated and work.record.state is State.STARTED:
        await _hand_over(work)
    record = work.record
    if record.state is not State.DESTROYING:
        at_ms = work.keeper.now_ms()
        await work.keeper.change(
            lambda r: replace(r, state=State.DESTROYING, reason=""),
            events=(event("destroy", "destroying", record.desired.source, at_ms),),
            begin="destroy",
        )
    ended: tuple[Runtime | None, ...] = ()
    why, last = ("placed on another host", State.MIGRATED) if migrated else ("destroyed", State.DESTROYED)
    if record.runtime == "running":
        ended = (await stopping.end_app(work),)
    work.watch.end()
    await work.body.clear(work.record, for_good=True)
    await work.body.leave_network()
    at_ms = work.keeper.now_ms()
    await work.keeper.change(
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
        end=("destroy", "start", "prepare", "clear", "stop", "update", "suspend"),
    )
    return AT_ONCE


async def _hand_over(work: Work) -> None:
    """The copy elsewhere is shown already: what other hosts still send here, because they have not heard yet, is
    served; then the rest is drained."""
    await work.context.clock.sleep(work.context.pace.hand_over_s)
    await work.drain()
