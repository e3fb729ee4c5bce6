"""Is a machine's new version well? Watches until it is, or says why it never will be.

Well means: started with the new version (its ports accept) and, where it has checks, each passing. What goes wrong
is told with what the user needs: the exit code, the last lines of its log, the address it listens on instead.
"""

from __future__ import annotations

import anyio

from pantala.client.api import ApiClient
from pantala.errors import PantalaError, TransientError, UserError
from pantala.wire.machine import Event, ExitEvent, Machine

POLL_EVERY_S = 0.2
AWAY_EVERY_S = 1.0
EXITS_MAX = 2
"""The exit after which a version is given up, although its restart policy would go on."""

SMOKE_FIRST_S = 3.0
SMOKE_OTHERS_S = 0.5
"""How long a machine without checks must stay up after its ports accept: the first of a version, and those after it.
Servers that bind before they load the app (gunicorn does) accept and end a second later."""

LOG_LINES = 45


class Unhealthy(UserError):
    """The version does not come up. The message holds the reason, the hint the end of its log."""

    status = "unhealthy"


class HealthWatch:
    def __init__(self, client: ApiClient, app: str, *, smoke_checks: bool = True) -> None:
        self._client = client
        self._app = app
        self._smoke_checks = smoke_checks
        self._proven = False

    async def until_well(self, machine_id: str, *, version: str, since_ms: int, timeout_s: float) -> Machine:
        """The machine once it is well. Raises Unhealthy."""
        deadline = anyio.current_time() + timeout_s
        well_since: float | None = None
        while True:
            try:
                machine = await self._client.machine(self._app, machine_id)
            except TransientError:
                # The API may be away for a moment (its server restarts); the machine is none the worse for it.
                if anyio.current_time() > deadline:
                    raise
                await anyio.sleep(AWAY_EVERY_S)
                continue
            await self._raise_if_hopeless(machine, since_ms=since_ms)
            if machine.instance_id != version:
                raise Unhealthy(f"machine {machine_id} was changed by someone else during the deploy")
            if is_asleep(machine, since_ms=since_ms):
                self._proven = True
                return machine
            now = anyio.current_time()
            if machine.state == "started" and is_ready(machine, since_ms=since_ms):
                well_since = well_since if well_since is not None else now
                if machine.checks or not self._smoke_checks or now - well_since >= self._smoke_s():
                    self._proven = True
                    return machine
            else:
                well_since = None
            if now > deadline:
                raise await self._unhealthy(machine, self._still(machine, timeout_s))
            await anyio.sleep(POLL_EVERY_S)

    def _smoke_s(self) -> float:
        return SMOKE_OTHERS_S if self._proven else SMOKE_FIRST_S

    async def _raise_if_hopeless(self, machine: Machine, *, since_ms: int) -> None:
        if bind := wrong_bind(machine, since_ms=since_ms):
            raise await self._unhealthy(machine, bind)
        exits = [event for event in crashes(machine) if event.timestamp >= since_ms]
        ended = machine.state in ("stopped", "failed", "launch_failed", "destroyed")
        if exits and (ended or len(exits) >= EXITS_MAX):
            exit_event = exit_of(exits[0])
            raise await self._unhealthy(machine, f"machine {machine.id} {described(exit_event)}")
        if machine.state in ("failed", "launch_failed"):
            raise await self._unhealthy(machine, f"machine {machine.id} could not start: {_reason(machine)}")

    def _still(self, machine: Machine, timeout_s: float) -> str:
        failing = [check for check in machine.checks if check.status != "passing"]
        if failing:
            return f"check {failing[0].name} of machine {machine.id} still fails after {timeout_s:g} s: " + (
                failing[0].output or "no answer"
            )
        return f"machine {machine.id} is still {machine.state} after {timeout_s:g} s: {_reason(machine)}"

    async def _unhealthy(self, machine: Machine, reason: str) -> Unhealthy:
        return Unhealthy(reason, hint=await self._last_lines(machine.id))

    async def _last_lines(self, machine_id: str) -> str | None:
        try:
            with anyio.fail_after(5):
                lines = (await self._client.logs(self._app, machine_id=machine_id, limit=LOG_LINES)).lines
        except (PantalaError, TimeoutError):
            return None
        text = "\n".join(f"    {line.message}" for line in lines if line.provider == "app")
        return f"last lines of its log:\n{text}" if text else None


def is_ready(machine: Machine, *, since_ms: int) -> bool:
    """Its checks pass; without checks its ports accept (the agent says so by an event); without services it runs."""
    if machine.checks:
        return all(check.status == "passing" for check in machine.checks)
    if not (machine.config and machine.config.services):
        return True
    return _accepted(machine, since_ms=since_ms)


def is_asleep(machine: Machine, *, since_ms: int) -> bool:
    """It was ready, then stopped on request: autostop, since nobody asked it anything while it was watched."""
    return machine.state == "stopped" and _accepted(machine, since_ms=since_ms)


def _accepted(machine: Machine, *, since_ms: int) -> bool:
    return any(event.type == "ready" and event.timestamp >= since_ms for event in machine.events)


def crashes(machine: Machine) -> list[Event]:
    """Exits nobody asked for, newest first."""
    return [
        event
        for event in machine.events
        if event.type == "exit" and (found := exit_of(event)) is not None and not found.requested_stop
    ]


def exit_of(event: Event) -> ExitEvent | None:
    return event.request.exit_event if event.request else None


def described(exit_event: ExitEvent | None, *, when: str = " at start") -> str:
    """How an app ended, as the rest of a sentence about it."""
    if exit_event is None:
        return "ended"
    if exit_event.oom_killed:
        return "ran out of memory; give it more with [[vm]] memory in fly.toml"
    if exit_event.guest_signal > 0:
        return f"was ended{when} by signal {exit_event.guest_signal}"
    return f"exited{when} with code {exit_event.exit_code}"


def wrong_bind(machine: Machine, *, since_ms: int) -> str | None:
    """What the agent found out since the update about an app that listens on the right port of the wrong address.

    An app that listens elsewhere or nowhere may only be slow; that becomes the reason when the time is up.
    """
    for event in machine.events:
        if event.timestamp >= since_ms and event.type == "listen" and event.request and event.request.reason:
            reason = event.request.reason
            return f"machine {machine.id}: {reason}" if reason.startswith("the app listens on") else None
    return None


def _reason(machine: Machine) -> str:
    for event in machine.events:
        if event.request and event.request.reason:
            return event.request.reason
    return "its ports do not accept yet"
