"""How a record looks after something happened to its machine. Pure; the machine task journals what these return."""

from __future__ import annotations

from msgspec.structs import replace

from pantala.domain.machine import State
from pantala.drivers.protocol import Runtime
from pantala.journal import Desired, MachineRecord

LOST = "what it held in memory is lost; its next start boots"

READY = frozenset({State.STOPPED, State.CREATED})
"""Nothing runs, and a start needs nothing but a prepared runtime."""


def started(record: MachineRecord, at_ms: int) -> MachineRecord:
    return replace(
        record,
        state=State.STARTED,
        reason="",
        runtime="running",
        runtime_instance=record.version.instance_id,
        started_at_ms=at_ms,
        stop_requested=False,
    )


def can_start_at_once(record: MachineRecord) -> bool:
    """One message starts it, or nothing but a thaw."""
    waits = (record.state in READY and record.runtime == "prepared") or (
        record.state is State.SUSPENDED and record.runtime == "suspended"
    )
    return waits and record.next_version is None and record.runtime_instance == record.version.instance_id


def lost(record: MachineRecord) -> MachineRecord:
    """What a suspended machine held in memory is gone; its next start boots."""
    return replace(
        settled(record), state=State.STOPPED, reason=LOST, runtime="none", runtime_instance="", stop_requested=False
    )


def settled(record: MachineRecord) -> MachineRecord:
    """Nothing is wanted any more of a machine that was to be stopped and is."""
    if record.desired.goal not in ("stopped", "created", "suspended"):
        return record
    return replace(record, desired=replace(record.desired, goal="rest"))


def at_rest(record: MachineRecord) -> MachineRecord:
    """Stopped for good, unless something else was asked for meanwhile; `auto_destroy` ends it."""
    if record.desired.goal == "migrated":
        return record
    if record.version.config.auto_destroy:
        return replace(record, desired=Desired(goal="destroyed", source="flyd", force=True), restarts_ms=())
    if record.desired.goal == "destroyed" or record.next_version is not None:
        return record
    return replace(record, desired=replace(record.desired, goal="rest", restart=False), restarts_ms=())


def run_ended(record: MachineRecord, reason: str) -> MachineRecord:
    """A scheduled machine's run is over: its list of runs says how it went. Skipped ones may be newer."""
    schedule = record.schedule
    runs = list(schedule.runs) if schedule is not None else []
    at = next((index for index, run in enumerate(runs) if run.outcome == "started"), None)
    if schedule is None or at is None:
        return record
    runs[at] = replace(runs[at], outcome="ended", reason=reason)
    return replace(record, schedule=replace(schedule, runs=tuple(runs)))


def exit_sentence(runtime: Runtime | None, reason: str) -> str:
    record = runtime.exit if runtime else None
    if record is None:
        return f"Main child was killed ({reason})" if reason else "Main child was killed"
    how = f"signal {record.signal}" if record.signal else f"code {record.exit_code}"
    said = f": {record.reason}" if record.reason else ""
    if record.exit_code == 0 and not record.signal:
        return f"Main child exited normally with code: 0{said}"
    oom = ", out of memory" if runtime and runtime.oom_killed else ""
    return f"Main child exited with {how}{oom}{said} ({reason})"
