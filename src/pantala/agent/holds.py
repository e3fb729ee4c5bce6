"""Holding awake: a job inside a machine says that it is not idle, whatever its requests look like. Pure.

Only autostop asks here: a stop or suspend by a caller, an update or the end of the app come through.
"""

from __future__ import annotations

from pantala.errors import InvalidRequest
from pantala.journal import HoldRecord, MachineRecord

HOLD_S_MAX = 24 * 3600
REASON_MAX = 200


def current(record: MachineRecord, now_ms: int) -> HoldRecord | None:
    hold = record.hold
    return hold if hold is not None and hold.until_ms > now_ms else None


def made(seconds: float, reason: str, now_ms: int) -> HoldRecord | None:
    """From now on; it replaces the one before. None for 0 seconds: it may sleep again."""
    if not 0 <= seconds <= HOLD_S_MAX:
        raise InvalidRequest(f"{seconds:g} is not between 0 and {HOLD_S_MAX} seconds", field="seconds")
    if not reason and seconds:
        raise InvalidRequest("say why the machine must stay awake", field="reason")
    if len(reason) > REASON_MAX:
        raise InvalidRequest(f"{len(reason)} characters; at most {REASON_MAX}", field="reason")
    return HoldRecord(until_ms=now_ms + int(seconds * 1000), reason=reason) if seconds else None
