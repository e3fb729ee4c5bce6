"""Entries of a machine's history, as the Machines API shows them. Pure but for ids."""

from __future__ import annotations

from pantala.drivers.protocol import Runtime
from pantala.kit.clock import rfc3339_ms
from pantala.kit.ids import ulid
from pantala.wire.machine import Event, EventRequest, ExitEvent


def event(
    kind: str, status: str, source: str, at_ms: int, *, reason: str = "", request: EventRequest | None = None
) -> Event:
    if request is None and reason:
        request = EventRequest(reason=reason)
    return Event(id=ulid(at_ms), type=kind, status=status, source=source, timestamp=at_ms, request=request)


def exit_event(
    runtime: Runtime | None, at_ms: int, *, requested: bool, restarting: bool, restart_count: int, reason: str
) -> Event:
    """How the app ended. Without a record (its PID 1 was killed) it counts as killed."""
    record = runtime.exit if runtime else None
    code = record.exit_code if record else 137
    signal = record.signal if record else 9
    exited = record.exited_at_ms if record and record.exited_at_ms else at_ms
    shown = ExitEvent(
        exit_code=code,
        guest_exit_code=code,
        guest_signal=signal,
        oom_killed=bool(runtime and runtime.oom_killed),
        requested_stop=requested,
        restarting=restarting,
        signal=signal if signal else -1,
        exited_at=rfc3339_ms(exited),
    )
    request = EventRequest(exit_event=shown, restart_count=restart_count, reason=reason)
    return event("exit", "stopped", "flyd", at_ms, request=request)
