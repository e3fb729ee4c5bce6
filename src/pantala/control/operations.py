"""Everything that is asked of one existing machine: found by its placement, passed on to the node that owns it."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec
import structlog

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.machines import MACHINE_NOT_FOUND, Machines
from pantala.control.projection import Projection
from pantala.domain import guests, signals
from pantala.domain.durations import seconds
from pantala.errors import InvalidRequest, NodeUnreachable, NotFound, PantalaError
from pantala.kit import ids
from pantala.kit.sealing import b64, unb64
from pantala.store import ledger
from pantala.store.records import AppRecord, PlacementRecord
from pantala.wire.api import (
    ExecRequest,
    ExecResponse,
    Lease,
    LeaseRequest,
    LeaseResponse,
    MachineVersion,
    MemoryRequest,
    MemoryResponse,
    ProcessStat,
    ReclaimRequest,
    ReclaimResponse,
    SignalRequest,
    StartResponse,
    StopRequest,
    UpdateMetadataRequest,
    WaitResponse,
)
from pantala.wire.machine import Event, MachineConfig
from pantala.wire.node import (
    AcquireLease,
    CordonMachine,
    ExecMachine,
    ExecResult,
    GetLease,
    GetMemory,
    ListEvents,
    ListProcesses,
    ListVersions,
    MemoryState,
    NodeRequest,
    PatchMetadata,
    ReclaimedMemory,
    ReclaimMemory,
    ReleaseLease,
    RestartMachine,
    SetMemory,
    SetMetadata,
    SignalMachine,
    StartMachine,
    StartResult,
    StopMachine,
    SuspendMachine,
    WaitMachine,
)

log = structlog.get_logger()

WAIT_STATES = ("created", "started", "stopped", "suspended", "destroyed", "failed", "settled")
WAIT_TIMEOUT_S_MAX = 60
WAIT_SLACK_S = 5.0
LEASE_TTL_S = 60
LEASE_TTL_S_MAX = 3600
STOP_TIMEOUT_S_MAX = 86_400.0
METADATA_LENGTH_MAX = 4096
EVENTS_MAX = 50
EXEC_TIMEOUT_S, EXEC_TIMEOUT_S_MAX = 60, 60
EXEC_LENGTH_MAX = 128 * 1024
RECLAIM_MB_MAX = 1 << 20
SORTABLE = ("pid", "command", "directory", "cpu", "rss", "rtime", "stime")
ORDERS = ("asc", "desc")


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """A command that ended, with the bytes that it wrote."""

    exit_code: int
    signal: int
    stdout: bytes
    stderr: bytes
    truncated: bool

    def document(self) -> ExecResponse:
        return ExecResponse(
            exit_code=self.exit_code,
            exit_signal=self.signal,
            stdout=self.stdout.decode(errors="replace"),
            stderr=self.stderr.decode(errors="replace"),
            truncated=self.truncated,
        )


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

    async def suspend(self, principal: Principal, app: str, machine_id: str, *, nonce: str) -> None:
        """Its memory is kept; the next start goes on from it if it can."""
        await self._change(
            principal, app, SuspendMachine(request_id=_fresh("suspend"), machine_id=machine_id, nonce=nonce)
        )

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
        timeout_s: float,
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
            timeout_s=timeout_s,
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
        return LeaseResponse.of(lease)

    async def get_lease(self, principal: Principal, app: str, machine_id: str) -> LeaseResponse:
        lease: Lease = await self._read(principal, app, GetLease(machine_id=machine_id))
        return LeaseResponse.of(lease)

    async def release_lease(self, principal: Principal, app: str, machine_id: str, *, nonce: str) -> None:
        if not nonce:
            raise InvalidRequest("is required to release a lease", field="fly-machine-lease-nonce")
        call = ReleaseLease(request_id=_fresh("release"), machine_id=machine_id, nonce=nonce)
        await self._change(principal, app, call)

    # -- metadata, events, versions, memory ------------------------------------------------------------------------

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

    async def update_metadata(
        self, principal: Principal, app: str, machine_id: str, request: UpdateMetadataRequest, *, nonce: str
    ) -> None:
        """Several keys, all or none. Raises WrongState (412) when the machine has another version by now."""
        for key, value in request.metadata.items():
            if not key or max(len(key), len(value or "")) > METADATA_LENGTH_MAX:
                raise InvalidRequest(f"key and value may have {METADATA_LENGTH_MAX} characters", field="metadata")
        call = PatchMetadata(
            request_id=_fresh("metadata"),
            machine_id=machine_id,
            metadata={key: value or None for key, value in request.metadata.items()},
            version=request.machine_version or None,
            nonce=nonce,
        )
        await self._change(principal, app, call)

    async def versions(self, principal: Principal, app: str, machine_id: str) -> list[MachineVersion]:
        """Newest first."""
        found: list[MachineVersion] = await self._read(principal, app, ListVersions(machine_id=machine_id))
        return found

    async def memory(self, principal: Principal, app_name: str, machine_id: str) -> MemoryResponse:
        """As its host says, else (the host does not answer, the machine is gone) by its config."""
        app = await self._access.app(principal, app_name, Action.READ)
        placement = await self._machines.placement(app, machine_id)
        if not placement.tombstone:
            try:
                found: MemoryState = await self._context.nodes.call(placement.node, GetMemory(machine_id=machine_id))
                return MemoryResponse(available_mb=found.available_mib, limit_mb=found.limit_mib)
            except NodeUnreachable:
                log.info("the host does not say what memory is in use", machine=machine_id, node=placement.node)
        machine = await self._projection.machine(placement)
        limit_mb = guests.resolve(machine.config or machine.incomplete_config or MachineConfig()).memory_mb
        return MemoryResponse(available_mb=limit_mb, limit_mb=limit_mb)

    async def set_memory(
        self, principal: Principal, app: str, machine_id: str, request: MemoryRequest, *, nonce: str
    ) -> MemoryResponse:
        """Of a started machine, up to its size and until its next start. Its place on the host stays as large."""
        call = SetMemory(request_id=_fresh("memory"), machine_id=machine_id, limit_mib=request.limit_mb, nonce=nonce)
        found: MemoryState = await self._change(principal, app, call)
        return MemoryResponse(available_mb=found.available_mib, limit_mb=found.limit_mib)

    async def reclaim_memory(
        self, principal: Principal, app: str, machine_id: str, request: ReclaimRequest, *, nonce: str
    ) -> ReclaimResponse:
        if not 1 <= request.amount_mb <= RECLAIM_MB_MAX:
            raise InvalidRequest(f"must be 1 to {RECLAIM_MB_MAX}", field="amount_mb")
        call = ReclaimMemory(
            request_id=_fresh("reclaim"), machine_id=machine_id, amount_mib=request.amount_mb, nonce=nonce
        )
        done: ReclaimedMemory = await self._change(principal, app, call)
        return ReclaimResponse(actual_mb=done.actual_mib)

    async def events(self, principal: Principal, app: str, machine_id: str, *, limit: int) -> list[Event]:
        if not 1 <= limit <= EVENTS_MAX:
            raise InvalidRequest(f"must be 1 to {EVENTS_MAX}", field="limit")
        found: list[Event] = await self._read(principal, app, ListEvents(machine_id=machine_id, limit=limit))
        return found

    # -- inside: processes, signals, commands ----------------------------------------------------------------------

    async def processes(
        self, principal: Principal, app: str, machine_id: str, *, sort_by: str, order: str
    ) -> list[ProcessStat]:
        if sort_by not in SORTABLE:
            raise InvalidRequest(f"{sort_by!r} is not one of {', '.join(SORTABLE)}", field="sort_by")
        if order not in ORDERS:
            raise InvalidRequest(f"{order!r} is not one of {', '.join(ORDERS)}", field="order")
        found: list[ProcessStat] = await self._read(principal, app, ListProcesses(machine_id=machine_id))
        return sorted(found, key=lambda process: getattr(process, sort_by), reverse=order == "desc")

    async def signal(
        self, principal: Principal, app: str, machine_id: str, request: SignalRequest, *, nonce: str
    ) -> None:
        number = signals.sendable(request.signal)
        call = SignalMachine(request_id=_fresh("signal"), machine_id=machine_id, signal=number, nonce=nonce)
        await self._change(principal, app, call)

    async def run_command(
        self, principal: Principal, app_name: str, machine_id: str, request: ExecRequest, *, nonce: str
    ) -> Ran:
        """Raises RequestTimeout when the command did not end in time; it is killed then."""
        call = ExecMachine(
            request_id=_fresh("exec"),
            machine_id=machine_id,
            argv=_argv(request),
            stdin_base64=b64((request.stdin or "").encode()),
            container=_container(request),
            machine=bool(request.machine),
            timeout_s=_exec_timeout(request.timeout),
            nonce=nonce,
        )
        app, placement = await self._owner(principal, app_name, Action.DEPLOY, machine_id)
        entry = await self._context.db.write(
            lambda c: self._context.audit_app(c, principal, app, "machine.exec", machine_id)
        )
        try:
            done: ExecResult = await self._context.nodes.call(
                placement.node, call, timeout_s=call.timeout_s + WAIT_SLACK_S
            )
        except PantalaError as error:
            why = error.message
            await self._context.db.write(lambda c: ledger.note_outcome(c, entry, why))
            raise
        ended = f"signal {done.signal}" if done.signal else f"exit code {done.exit_code}"
        await self._context.db.write(lambda c: ledger.note_outcome(c, entry, ended))
        return Ran(
            exit_code=done.exit_code,
            signal=done.signal,
            stdout=unb64(done.stdout_base64),
            stderr=unb64(done.stderr_base64),
            truncated=done.truncated,
        )

    async def _change(self, principal: Principal, app: str, call: Any) -> Any:
        return await self._pass_on(principal, app, Action.DEPLOY, call)

    async def _read(self, principal: Principal, app: str, call: Any) -> Any:
        return await self._pass_on(principal, app, Action.READ, call)

    async def _pass_on(self, principal: Principal, app_name: str, action: Action, call: Any) -> Any:
        _, placement = await self._owner(principal, app_name, action, call.machine_id)
        request: NodeRequest = call
        return await self._context.nodes.call(placement.node, request)

    async def _owner(
        self, principal: Principal, app_name: str, action: Action, machine_id: str
    ) -> tuple[AppRecord, PlacementRecord]:
        app = await self._access.app(principal, app_name, action)
        placement = await self._machines.placement(app, machine_id)
        if placement.tombstone and action is Action.DEPLOY:
            raise NotFound(MACHINE_NOT_FOUND)
        return app, placement


def _fresh(what: str) -> str:
    return f"{what}-{ids.ulid()}"


def _argv(request: ExecRequest) -> list[str]:
    """`command` as it is; the deprecated `cmd` is split as a shell would, and no shell runs it."""
    if request.command and request.cmd:
        raise InvalidRequest("give it or cmd, not both", field="command")
    argv = list(request.command or [])
    if request.cmd:
        try:
            argv = shlex.split(request.cmd)
        except ValueError as error:
            raise InvalidRequest(f"{error}".lower(), field="cmd") from error
    if not argv or not argv[0]:
        raise InvalidRequest("a command is required", field="command")
    if any("\0" in word for word in argv) or sum(map(len, argv)) > EXEC_LENGTH_MAX:
        raise InvalidRequest(f"may have {EXEC_LENGTH_MAX} characters, none of them NUL", field="command")
    return argv


def _container(request: ExecRequest) -> str:
    if request.container and request.machine:
        raise InvalidRequest("give it or container, not both", field="machine")
    return request.container or ""


def _exec_timeout(timeout_s: int | None) -> float:
    """0 is what clients send for *the usual*."""
    if not 0 <= (timeout_s or 0) <= EXEC_TIMEOUT_S_MAX:
        raise InvalidRequest(f"must be 1 to {EXEC_TIMEOUT_S_MAX} seconds", field="timeout")
    return float(timeout_s or EXEC_TIMEOUT_S)


def _stop_timeout(timeout_s: float) -> float | None:
    """0 is what clients send for *the config's own*."""
    if not 0 <= timeout_s <= STOP_TIMEOUT_S_MAX:
        raise InvalidRequest(f"must be 0 to {STOP_TIMEOUT_S_MAX:g} seconds", field="timeout")
    return timeout_s or None
