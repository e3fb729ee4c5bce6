"""Steps that exchange a machine's version."""

from __future__ import annotations

from msgspec.structs import replace

from pantala.agent import stopping
from pantala.agent.events import event, exit_event
from pantala.agent.work import AT_ONCE, Work
from pantala.domain.machine import State
from pantala.drivers.protocol import Runtime
from pantala.errors import PantalaError
from pantala.journal import MachineRecord


async def update(work: Work) -> float:
    """Fetch the new image first, then drain, stop, exchange the version and go where it should be."""
    record = work.record
    coming = record.next_version
    if record.state is not State.UPDATING and coming is not None:
        try:
            image = await work.pull(coming)
        except PantalaError as error:
            return await _failed(work, coming.instance_id, error)
        if record.state is State.STARTED:
            await work.drain()
        if image is None or work.record.next_version != coming or work.record.desired.ends:
            return AT_ONCE
        at_ms = work.keeper.now_ms()
        await work.keeper.change(
            lambda r: replace(r, state=State.UPDATING, reason="", stop_requested=True),
            events=(event("update", "updating", record.desired.source, at_ms),),
            begin="update",
        )
    return await _exchange(work)


async def _exchange(work: Work) -> float:
    record = work.record
    ended: tuple[Runtime | None, ...] = ()
    if record.runtime == "running":
        ended = (await stopping.end_app(work),)
    work.watch.end()
    await work.body.clear(work.record)
    at_ms = work.keeper.now_ms()
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

    await work.keeper.change(
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


async def _failed(work: Work, instance_id: str, error: PantalaError) -> float:
    """The old version goes on; its history says why the new one did not come."""
    at_ms = work.keeper.now_ms()
    reason = f"version {instance_id} did not come: {error.sentence()}"

    def keep(r: MachineRecord) -> MachineRecord:
        gave_up = r.next_version is not None and r.next_version.instance_id == instance_id
        return replace(r, next_version=None if gave_up else r.next_version, reason=reason)

    await work.keeper.change(keep, events=(event("update", "failed", "flyd", at_ms, reason=reason),))
    await work.say(f"machine was not updated: {reason}", "error")
    return AT_ONCE
