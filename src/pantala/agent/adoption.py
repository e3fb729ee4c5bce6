"""What a new agent does with a machine that another one left at any point. Called once per machine, before its task."""

from __future__ import annotations

from msgspec.structs import replace

from pantala.agent.body import Body
from pantala.agent.events import event
from pantala.agent.keeper import Keeper
from pantala.agent.outcomes import LOST, lost, started
from pantala.domain.machine import TERMINAL, State
from pantala.drivers.protocol import Driver, Runtime
from pantala.errors import DriverError


async def adopt(keeper: Keeper, body: Body, driver: Driver) -> None:
    """Make record and driver agree after another agent died at any point; what runs is left alone."""
    record = keeper.record
    found = await driver.inspect(record.id)
    current = found is not None and found.instance_id == record.version.instance_id
    if record.state in (State.DESTROYING, State.STOPPING, State.UPDATING, State.SUSPENDING):
        return  # `run` repeats these from their beginning; every part of them is safe to repeat.
    if record.state is State.STARTED:
        if found is not None and (found.phase == "prepared" or not current):
            await body.clear(record)
        return
    if record.state is State.SUSPENDED:
        await _adopt_suspended(keeper, body, driver, found if current else None)
        return
    asleep = found is not None and current and found.phase == "suspended"
    if record.state is State.STARTING and record.runtime == "suspended" and asleep:
        return  # `run` resumes it.
    if record.state is State.STARTING and found is not None and current and found.phase != "prepared":
        at_ms = keeper.now_ms()
        await keeper.change(
            lambda r: started(r, at_ms), events=(event("start", "started", "flyd", at_ms),), end=("start",)
        )
        return
    if found is not None and current and found.phase == "prepared" and record.state not in TERMINAL:
        await keeper.change(
            lambda r: replace(r, runtime="prepared", runtime_instance=r.version.instance_id), end=("prepare",)
        )
        return
    await body.clear(record)
    kept_open = () if record.state is State.STARTING else ("start",)
    await keeper.change(lambda r: replace(r, runtime="none", runtime_instance=""), end=("prepare", "clear", *kept_open))


async def _adopt_suspended(keeper: Keeper, body: Body, driver: Driver, found: Runtime | None) -> None:
    """It still sleeps, or was thawed by somebody else and sleeps again, or what it held is lost."""
    if found is not None and found.phase in ("running", "suspended"):
        try:
            await driver.suspend(keeper.record.id)
        except DriverError:
            pass
        else:
            return
    await body.clear(keeper.record)
    at_ms = keeper.now_ms()
    await keeper.change(lost, events=(event("suspend", "lost", "flyd", at_ms, reason=LOST),))
