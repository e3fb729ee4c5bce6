"""Everything that is asked of one existing machine: found by its placement, passed on to the node that owns it."""

from __future__ import annotations

from typing import Any

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.machines import MACHINE_NOT_FOUND, Machines
from pantala.control.projection import Projection
from pantala.domain.durations import seconds
from pantala.errors import InvalidRequest, NotFound
from pantala.kit import ids
from pantala.wire.api import (
    Lease,
    LeaseRequest,
    LeaseResponse,
    ProcessStat,
    StartResponse,
    StopRequest,
    WaitResponse,
)
from pantala.wire.machine import Event
from pantala.wire.node import (
    AcquireLease,
    CordonMachine,
    GetLease,
    ListEvents,
    ListProcesses,
    NodeRequest,
    ReleaseLease,
    RestartMachine,
    SetMetadata,
    StartMachine,
    StartResult,
    StopMachine,
    WaitMachine,
)

WAIT_STATES = ("created", "started", "stopped", "suspended", "destroyed", "failed", "settled")
WAIT_TIMEOUT_S_MAX = 60
WAIT_SLACK_S = 5.0
LEASE_TTL_S = 60
LEASE_TTL_S_MAX = 86_400
STOP_TIMEOUT_S_MAX = 86_400.0
METADATA_LENGTH_MAX = 4096
EVENTS_MAX = 50


class Operations:
    def __init__(self, context: Context, access: Access, machines: Machines, projection: Projection) -> None:
        self._context = context
        self._access = access
        self._machines = machines
        self._projection = projection

    async def start(self, principal: Principal, app: str, machine_id: str, *, nonce: str) -> StartResponse:
        call = StartMachine(request_id=_fresh("start"), machine_id=machine_id, nonce=nonce)
        result: StartResult = await self._change(principal, app, call)
        return StartResponse(previous_state=result.previous_state)

    async def stop(self, principal: Principal, app: str, machine_id: str, request: StopRequest, *, nonce: str) -> None:
        timeout_s = seconds(request.timeout, field="timeout", default=0.0)
        call = StopMachine(
            request_id=_fresh("stop"),
            machine_id=machine_id,
            signal=request.signal or None,
            timeout_s=_stop_timeout(timeout_s),
            nonce=nonce,
        )
        await self._change(principal, app, call)

    async def restart(
        self,
        principal: Principal,
        app: str,
        machine_id: str,
        *,
        signal: str | None,
        timeout: str | None,
        force_stop: bool,
        nonce: str,
    ) -> None:
        """`timeout`: a Go duration, or a bare number of seconds."""
        timeout_s = float(timeout) if timeout and timeout.isdigit() else seconds(timeout, field="timeout", default=0.0)
        call = RestartMachine(
            request_id=_fresh("restart"),
            machine_id=machine_id,
            signal=signal or None,
            timeout_s=_stop_timeout(timeout_s),
            force_stop=force_stop,
            nonce=nonce,
        )
        await self._change(principal, app, call)

    async def cordon(self, principal: Principal, app: str, machine_id: str, *, cordoned: bool, nonce: str) -> None:
        call = CordonMachine(request_id=_fresh("cordon"), machine_id=machine_id, cordoned=cordoned, nonce=nonce)
        await self._change(principal, app, call)

    # -- waiting -------------------------------------------------------------------------------------------------

    async def wait(
        self,
        principal: Principal,
        app_name: str,
        machine_id: str,
        *,
        states: list[str],
        timeout_s: int,
        version: str | None,
        from_event_id: str | None,
    ) -> WaitResponse:
        """Raises RequestTimeout (408) when none of the states was reached in time."""
        for state in states:
            if state not in WAIT_STATES:
                raise InvalidRequest(f"{state!r} is none of {', '.join(WAIT_STATES)}", field="state")
        if not 1 <= timeout_s <= WAIT_TIMEOUT_S_MAX:
            raise InvalidRequest(f"must be 1 to {WAIT_TIMEOUT_S_MAX} seconds", field="timeout")
        app = await self._access.app(principal, app_name, Action.READ)
        placement = await self._machines.placement(app, machine_id)
        call = WaitMachine(
            machine_id=machine_id,
            states=states,
            timeout_s=float(timeout_s),
            version=version,
            from_event_id=from_event_id,
        )
        try:
            reached: WaitResponse = await self._context.nodes.call(
                placement.node, call, timeout_s=timeout_s + WAIT_SLACK_S
            )
        except NotFound:
            if placement.tombstone and "destroyed" in states:
                return WaitResponse(ok=True, state="destroyed", version=version or "", event_id="")
            raise
        if reached.state == "destroyed":
            await self._machines.bury(machine_id)
        return reached

    # -- leases --------------------------------------------------------------------------------------------------

    async def acquire_lease(
        self, principal: Principal, app: str, machine_id: str, request: LeaseRequest, *, nonce: str
    ) -> LeaseResponse:
        """Without a nonce acquires, with one refreshes."""
        ttl_s = LEASE_TTL_S if request.ttl is None else request.ttl
        if not 1 <= ttl_s <= LEASE_TTL_S_MAX:
            raise InvalidRequest(f"must be 1 to {LEASE_TTL_S_MAX} seconds", field="ttl")
        call = AcquireLease(
            request_id=_fresh("lease"),
            machine_id=machine_id,
            ttl_s=ttl_s,
            owner=principal.email,
            description=request.description or "",
            nonce=nonce,
        )
        lease: Lease = await self._change(principal, app, call)
        return LeaseResponse(status="success", data=lease)

    async def get_lease(self, principal: Principal, app: str, machine_id: str) -> LeaseResponse:
        lease: Lease = await self._read(principal, app, GetLease(machine_id=machine_id))
        return LeaseResponse(status="success", data=lease)

    async def release_lease(self, principal: Principal, app: str, machine_id: str, *, nonce: str) -> None:
        if not nonce:
            raise InvalidRequest("is required to release a lease", field="fly-machine-lease-nonce")
        call = ReleaseLease(request_id=_fresh("release"), machine_id=machine_id, nonce=nonce)
        await self._change(principal, app, call)

    # -- metadata, events, processes -----------------------------------------------------------------------------

    async def metadata(self, principal: Principal, app_name: str, machine_id: str) -> dict[str, str]:
        app = await self._access.app(principal, app_name, Action.READ)
        machine = await self._projection.machine(await self._machines.placement(app, machine_id))
        config = machine.config or machine.incomplete_config
        return (config.metadata if config else None) or {}

    async def set_metadata(
        self, principal: Principal, app: str, machine_id: str, key: str, value: str | None, *, nonce: str
    ) -> None:
        """None removes. Makes no new version of the machine."""
        if not key or len(key) > METADATA_LENGTH_MAX or len(value or "") > METADATA_LENGTH_MAX:
            raise InvalidRequest(f"key and value may have {METADATA_LENGTH_MAX} characters", field="value")
        call = SetMetadata(request_id=_fresh("metadata"), machine_id=machine_id, key=key, value=value, nonce=nonce)
        await self._change(principal, app, call)

    async def events(self, principal: Principal, app: str, machine_id: str, *, limit: int) -> list[Event]:
        if not 1 <= limit <= EVENTS_MAX:
            raise InvalidRequest(f"must be 1 to {EVENTS_MAX}", field="limit")
        found: list[Event] = await self._read(principal, app, ListEvents(machine_id=machine_id, limit=limit))
        return found

    async def processes(
        self, principal: Principal, app: str, machine_id: str, *, sort_by: str, descending: bool
    ) -> list[ProcessStat]:
        if sort_by not in ProcessStat.__struct_fields__ or sort_by == "listen_sockets":
            raise InvalidRequest(
                f"cannot sort by {sort_by!r}", field="sort_by", hint="sort by pid, cpu, rss or command"
            )
        found: list[ProcessStat] = await self._read(principal, app, ListProcesses(machine_id=machine_id))
        return sorted(found, key=lambda process: getattr(process, sort_by), reverse=descending)

    async def _change(self, principal: Principal, app: str, call: Any) -> Any:
        return await self._pass_on(principal, app, Action.DEPLOY, call)

    async def _read(self, principal: Principal, app: str, call: Any) -> Any:
        return await self._pass_on(principal, app, Action.READ, call)

    async def _pass_on(self, principal: Principal, app_name: str, action: Action, call: Any) -> Any:
        app = await self._access.app(principal, app_name, action)
        placement = await self._machines.placement(app, call.machine_id)
        if placement.tombstone and action is Action.DEPLOY:
            raise NotFound(MACHINE_NOT_FOUND)
        request: NodeRequest = call
        return await self._context.nodes.call(placement.node, request)


def _fresh(what: str) -> str:
    return f"{what}-{ids.ulid()}"


def _stop_timeout(timeout_s: float) -> float | None:
    """0 is what clients send for *the config's own*."""
    if not 0 <= timeout_s <= STOP_TIMEOUT_S_MAX:
        raise InvalidRequest(f"must be 0 to {STOP_TIMEOUT_S_MAX:g} seconds", field="timeout")
    return timeout_s or None
