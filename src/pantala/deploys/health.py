"""Is a machine's new version well? Watches until it is, or says why it never will be.

Well means: started with the new version (its ports accept) and, where it has checks, each passing; an HTTP service
without checks has to have answered once, whatever it said (the agent asks, `agent/health.py`). What goes wrong is told
with what the user needs: the exit code, the last lines of its log, the address it listens on instead.
"""

from __future__ import annotations

import anyio

from pantala.client.api import ApiClient
from pantala.domain.answers import asked_ports
from pantala.errors import PantalaError, TransientError, UserError
from pantala.wire.machine import Event, ExitEvent, Machine

POLL_EVERY_S = 0.2
AWAY_EVERY_S = 1.0
EXITS_MAX = 2
"""The exit after which a version is given up, although its restart policy would go on."""

SMOKE_FIRST_S = 3.0
SMOKE_OTHERS_S = 0.5
"""How long a machine that is neither checked nor asked must stay up after its ports accept: the first of a version, and
those after it. Servers may bind before they load the app, accept and end a second later."""

SILENT_S = 15.0
SILENT_LOOKS = 15
SILENT_ENDED_MIN = 3
"""An app that accepts but does not answer may be slow to load: it has until the deploy's wait timeout. It is given up
after `SILENT_S`, with so many looks at its processes, when so many of them have ended: a server whose workers die as
soon as they start."""

LOG_LINES = 45


class Unhealthy(UserError):
    """The version does not come up. The message holds the reason, the hint the end of its log."""

    status = "unhealthy"


class NotTaken(Unhealthy):
    """The host gave the new version up (its image did not come); the machine runs on as it was."""


class HealthWatch:
    def __init__(self, client: ApiClient, app: str, *, smoke_checks: bool = True, silent_s: float = SILENT_S) -> None:
        self._client = client
        self._app = app
        self._smoke_checks = smoke_checks
        self._silent_s = silent_s
        self._proven = False

    async def until_well(self, machine_id: str, *, version: str, since_ms: int, timeout_s: float) -> Machine:
        """The machine once it is well. Raises Unhealthy, NotTaken."""
        deadline = anyio.current_time() + timeout_s
        well_since: float | None = None
        silence = _Silence(self._silent_s / SILENT_LOOKS)
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
                if reason := not_taken(machine, version, since_ms=since_ms):
                    raise NotTaken(f"machine {machine_id} could not be updated: {reason}")
                raise Unhealthy(f"machine {machine_id} was changed by someone else during the deploy")
            if is_asleep(machine, since_ms=since_ms):
                self._proven = True
                return machine
            now = anyio.current_time()
            if machine.state == "started" and is_ready(machine, since_ms=since_ms):
                well_since = well_since if well_since is not None else now
                if self._has_proven_itself(machine, now - well_since, since_ms=since_ms):
                    self._proven = True
                    return machine
                if self._smoke_checks and owes_answer(machine, since_ms=since_ms):
                    await self._raise_if_dying(machine, silence, now - well_since)
            else:
                well_since = None
            if now > deadline:
                raise await self._unhealthy(machine, self._still(machine, timeout_s, since_ms=since_ms))
            await anyio.sleep(POLL_EVERY_S)

    def _has_proven_itself(self, machine: Machine, ready_for_s: float, *, since_ms: int) -> bool:
        """Of a machine that is ready: was it well for long enough, or did it answer?"""
        if not self._smoke_checks:
            return True
        if _asked(machine):
            return not owes_answer(machine, since_ms=since_ms)
        return bool(machine.checks) or ready_for_s >= (SMOKE_OTHERS_S if self._proven else SMOKE_FIRST_S)

    async def _raise_if_dying(self, machine: Machine, silence: _Silence, silent_for_s: float) -> None:
        if not silence.is_due():
            return
        try:
            processes = await self._client.processes(self._app, machine.id)
        except PantalaError:  # without a look at its processes it has the whole time
            return
        ended = silence.saw({process.pid for process in processes})
        if ended >= SILENT_ENDED_MIN and silent_for_s >= self._silent_s:
            raise await self._unhealthy(
                machine, f"machine {machine.id}: {_silent(machine)}: its processes end soon after they start"
            )

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

    def _still(self, machine: Machine, timeout_s: float, *, since_ms: int) -> str:
        failing = [check for check in machine.checks if check.status != "passing"]
        if failing:
            return f"check {failing[0].name} of machine {machine.id} still fails after {timeout_s:g} s: " + (
                failing[0].output or "no answer"
            )
        if machine.state == "started" and _accepted(machine, since_ms=since_ms):
            return f"machine {machine.id}: {_silent(machine)}, after {timeout_s:g} s"
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


class _Silence:
    """What becomes of the processes of an app that accepts but does not answer."""

    def __init__(self, look_every_s: float) -> None:
        self._look_every_s = look_every_s
        self._pids: set[int] = set()
        self._ended = 0
        self._look_at = 0.0

    def is_due(self) -> bool:
        if anyio.current_time() < self._look_at:
            return False
        self._look_at = anyio.current_time() + self._look_every_s
        return True

    def saw(self, pids: set[int]) -> int:
        """How many have ended since the first look."""
        self._ended += len(self._pids - pids)
        self._pids = pids
        return self._ended


def is_ready(machine: Machine, *, since_ms: int) -> bool:
    """Its checks pass; without checks its ports accept (the agent says so by an event); without services it runs."""
    if machine.checks:
        return all(check.status == "passing" for check in machine.checks)
    if not (machine.config and machine.config.services):
        return True
    return _accepted(machine, since_ms=since_ms)


def is_asleep(machine: Machine, *, since_ms: int) -> bool:
    """It was ready, then stopped on request: autostop, since nobody asked it anything while it was watched."""
    return (
        machine.state == "stopped"
        and _accepted(machine, since_ms=since_ms)
        and not owes_answer(machine, since_ms=since_ms)
    )


def owes_answer(machine: Machine, *, since_ms: int) -> bool:
    """The agent asks it over HTTP and has had no answer yet."""
    answered = any(event.type == "answer" and event.timestamp >= since_ms for event in machine.events)
    return bool(_asked(machine)) and not answered


def _asked(machine: Machine) -> list[int]:
    return asked_ports(machine.config) if machine.config else []


def _silent(machine: Machine) -> str:
    ports = ", ".join(str(port) for port in _asked(machine))
    return f"the app accepts connections on port {ports} but does not answer HTTP"


def _accepted(machine: Machine, *, since_ms: int) -> bool:
    return any(event.type == "ready" and event.timestamp >= since_ms for event in machine.events)


def not_taken(machine: Machine, version: str, *, since_ms: int) -> str | None:
    """Why its host gave this version up before it began with it; None if it did not."""
    prefix = f"version {version} did not come: "
    for event in machine.events:
        reason = (event.request.reason or "") if event.request else ""
        if event.timestamp >= since_ms and event.type == "update" and reason.startswith(prefix):
            return reason.removeprefix(prefix)
    return None


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
