"""The node API on the bus: `pantala.node.<node>.call`, called by control and by nobody else.

A mutation is answered once it is journaled, together with its outcome: a repeated `request_id` gets the first answer.
Errors of `pantala.errors` cross as `NodeError` and are raised again on the other side.
"""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import structlog
from msgspec.structs import replace

from pantala.agent import health, leases
from pantala.agent.events import event
from pantala.agent.host import Host
from pantala.agent.keeper import Outcome
from pantala.agent.queries import Queries
from pantala.agent.streams import Streams
from pantala.domain import containers, guests, signals, suspend, validate
from pantala.domain.machine import TERMINAL, State, Verb
from pantala.errors import (
    DriverError,
    InternalError,
    InvalidRequest,
    PantalaError,
    RateLimited,
    RequestTimeout,
    TransientError,
    UserError,
    WrongState,
)
from pantala.journal import Change, Desired, MachineRecord, Version
from pantala.kit.clock import unix_ms
from pantala.kit.ids import ulid
from pantala.wire import node
from pantala.wire.guest import Exec
from pantala.wire.machine import Event, Machine

log = structlog.get_logger()

_REQUEST = msgspec.json.Decoder(node.NodeRequest)
EXEC_S_MAX = 60.0
OUTCOME_BYTES_MAX = 64 * 1024
"""Of what is kept for a repetition; a longer output of a command is not."""
_FAILED = (State.FAILED, State.LAUNCH_FAILED)
METADATA_KEYS_MAX = 100
METADATA_VALUE_MAX = 4096


_Meddling = node.SignalMachine | node.ExecMachine | node.SetMemory | node.ReclaimMemory


class NodeApi:
    """`call` is the bus handler."""

    def __init__(self, host: Host, queries: Queries, streams: Streams | None = None) -> None:
        self._host = host
        self._queries = queries
        self._streams = streams or Streams(host)
        self._running: dict[str, anyio.Event] = {}

    async def call(self, subject: str, payload: bytes) -> bytes:
        del subject
        return await self.handle(payload)

    async def handle(self, payload: bytes) -> bytes:
        try:
            request = _REQUEST.decode(payload)
        except msgspec.DecodeError as error:
            return encode_error(UserError(f"the request cannot be read: {error}", status="invalid_request"))
        try:
            if isinstance(request, node.MUTATIONS):
                return await self._once(request)
            if isinstance(request, node.STREAMS):
                return encode(await self._streams.answer(request))
            return encode(await self._queries.answer(request))
        except PantalaError as error:
            return encode_error(error)
        except Exception:  # the boundary: logged whole here, shown as an id
            incident = ulid()
            log.exception("node call failed", op=type(request).__name__, incident=incident)
            return encode_error(InternalError(f"the host failed (incident {incident})", incident=incident))

    async def _once(self, request: Any) -> bytes:
        """The outcome of this request id: kept, on its way, or made now."""
        request_id: str = request.request_id
        while (running := self._running.get(request_id)) is not None:
            await running.wait()
        kept = await self._host.context.journal.outcome(request_id) if request_id else None
        if kept is not None:
            return kept
        done = self._running[request_id] = anyio.Event()
        try:
            return await self._mutate(request)
        finally:
            del self._running[request_id]
            done.set()

    async def _mutate(self, request: Any) -> bytes:
        match request:
            case node.CreateMachine():
                return await self._create(request)
            case node.UpdateMachine():
                return await self._update(request)
            case node.StartMachine():
                return await self._start(request)
            case node.StopMachine() | node.RestartMachine() | node.SuspendMachine() | node.DestroyMachine():
                return await self._wind_down(request)
            case node.SignalMachine() | node.ExecMachine() | node.SetMemory() | node.ReclaimMemory():
                return await self._meddle(request)
            case node.CordonMachine() | node.SetMetadata() | node.PatchMetadata():
                return await self._alter(request)
            case node.PutSecrets():
                answer = encode(None)
                await self._host.context.journal.commit(
                    Change(secrets=request.secrets, outcome=(request.request_id, answer), at_ms=self._now_ms())
                )
                return answer
            case node.AcquireLease() | node.ReleaseLease():
                return await self._lease(request)
            case node.PublishMachine():
                answer = encode(None)
                await self._host.publish(request.machine_id, request.generation, (request.request_id, answer))
                return answer
            case node.FenceMachine():
                answer = encode(None)
                await self._host.fence(request.machine_id, request.generation, (request.request_id, answer))
                return answer
            case _:
                raise InternalError(f"nobody handles {type(request).__name__}")

    # -- one each ------------------------------------------------------------------------------------------------------

    async def _create(self, request: node.CreateMachine) -> bytes:
        answer = _Answer(request.request_id)

        def shown(record: MachineRecord, events: list[Event]) -> Machine:
            return self._queries.document(record, nonce=record.lease.nonce if record.lease else None, events=events)

        record = await self._host.create(request, lambda record, launched: answer.keep(shown(record, [launched])))
        return answer.bytes or encode(shown(record, await self._queries.events(record.id)))

    async def _update(self, request: node.UpdateMachine) -> bytes:
        task = self._host.get(request.machine_id)
        validate.validate_config(request.config)
        self._host.check_isolation(guests.resolve(request.config))
        if request.secrets is not None:
            await self._host.context.journal.commit(Change(secrets=request.secrets, at_ms=self._now_ms()))
        now_ms = self._now_ms()
        version = self._host.new_version(request, now_ms)
        events = await self._queries.events(request.machine_id)
        answer = _Answer(request.request_id)

        def guard(record: MachineRecord) -> None:
            leases.check(record, request.nonce, now_ms)
            guests.check_root_goes_on(record.version.config, request.config)
            seen = record.latest.instance_id
            if request.current_version is not None and request.current_version != seen:
                raise WrongState(
                    f"current_version: the machine is at version {seen} now, not at {request.current_version}"
                )
            if not request.skip_launch and (record.desired.goal == "started" or record.state in _FAILED):
                self._host.check_room(guests.resolve(request.config), without=record.id)

        def want(record: MachineRecord) -> MachineRecord:
            goal = record.desired.goal
            if request.skip_launch:
                goal = "stopped"
            elif record.state in _FAILED:
                goal = "started"
            lease = record.lease
            if request.lease_ttl_s > 0:
                lease = leases.acquire(
                    record,
                    nonce=request.nonce,
                    ttl_s=request.lease_ttl_s,
                    owner=request.owner,
                    description="",
                    now_ms=now_ms,
                )
            return replace(
                record, next_version=version, desired=replace(record.desired, goal=goal, source="user"), lease=lease
            )

        def outcome(met: MachineRecord, wanted: MachineRecord) -> Outcome:
            nonce = wanted.lease.nonce if wanted.lease and request.lease_ttl_s > 0 else None
            starts = wanted.desired.goal == "started"
            checks = health.expected(version.config, now_ms) if starts else []
            return answer.keep(self._queries.document(wanted, nonce=nonce, events=events, checks=checks))

        await task.keeper.admit(Verb.UPDATE, want, guard=guard, outcome=outcome)
        return answer.bytes

    async def _start(self, request: node.StartMachine) -> bytes:
        task = self._host.get(request.machine_id)
        answer = _Answer(request.request_id)

        def guard(record: MachineRecord) -> None:
            leases.check(record, request.nonce, self._now_ms())
            self._host.check_room(guests.resolve(record.latest.config), without=record.id)

        wanted = Desired(goal="started")
        events: tuple[Event, ...] = ()
        if request.stands_for:
            wanted = replace(wanted, source="flyd")
            why = f"the host of {request.stands_for} is lost"
            events = (event("standby", "takes over", "flyd", self._now_ms(), reason=why),)
        await task.keeper.admit(
            Verb.START,
            lambda record: replace(record, desired=wanted, restarts_ms=(), restart_at_ms=0),
            source=wanted.source,
            guard=guard,
            outcome=lambda met, wanted: answer.keep(node.StartResult(previous_state=str(met.state))),
            events=events,
        )
        return answer.bytes

    async def _wind_down(
        self, request: node.StopMachine | node.RestartMachine | node.SuspendMachine | node.DestroyMachine
    ) -> bytes:
        """Stop, restart, suspend, destroy: they differ in where the machine ends."""
        match request:
            case node.StopMachine():
                verb = Verb.STOP
                wanted = Desired(goal="stopped", signal=request.signal, timeout_s=request.timeout_s)
            case node.RestartMachine():
                verb = Verb.RESTART
                timeout_s = 0.001 if request.force_stop else request.timeout_s
                wanted = Desired(goal="started", restart=True, signal=request.signal, timeout_s=timeout_s)
            case node.SuspendMachine():
                verb = Verb.SUSPEND
                wanted = Desired(goal="suspended")
            case node.DestroyMachine():
                verb = Verb.DESTROY
                wanted = Desired(goal="destroyed", force=request.force)
        if wanted.signal:
            signals.number(wanted.signal, field="signal")
        answer = _Answer(request.request_id)
        record = await self._host.find_record(request.machine_id)
        if record.state in TERMINAL and verb is Verb.DESTROY:
            return encode(None)
        task = self._host.get(request.machine_id)

        def guard(record: MachineRecord) -> None:
            leases.check(record, request.nonce, self._now_ms())
            if verb is Verb.SUSPEND and (why := suspend.why_not(record.latest.config)):
                raise WrongState(f"the machine cannot be suspended: {why}", hint="stop it instead")

        await task.keeper.admit(
            verb,
            lambda record: replace(record, desired=wanted),
            force=wanted.force,
            guard=guard,
            outcome=lambda met, wanted: answer.keep(None),
        )
        return answer.bytes

    async def _meddle(self, request: _Meddling) -> bytes:
        """What is done to the processes of a started machine, and to the memory they may use until its next start.
        Nothing of the machine's record changes."""
        record = self._host.get(request.machine_id).record
        leases.check(record, request.nonce, self._now_ms())
        if record.state is not State.STARTED:
            raise WrongState(f"machine is {record.state}, not started")
        if isinstance(request, node.ExecMachine):
            containers.check_there(record.version.config, request.container)
        try:
            if isinstance(request, node.SignalMachine):
                await self._host.context.driver.signal(request.machine_id, request.signal)
                answer = kept = encode(None)
            elif isinstance(request, node.SetMemory):
                answer = kept = encode(await self._set_memory(record, request.limit_mib))
            elif isinstance(request, node.ReclaimMemory):
                freed = await self._host.context.driver.reclaim_memory(record.id, request.amount_mib)
                answer = kept = encode(node.ReclaimedMemory(actual_mib=freed))
            else:
                result = await self._exec(request)
                answer = kept = encode(result)
                if len(answer) > OUTCOME_BYTES_MAX:
                    kept = encode(replace(result, stdout_base64="", stderr_base64="", truncated=True))
        except RequestTimeout as error:
            answer = kept = encode_error(error)
        except DriverError as error:
            if error.guest_fault:
                raise UserError(error.message) from error
            raise
        await self._host.context.journal.commit(Change(outcome=(request.request_id, kept), at_ms=self._now_ms()))
        return answer

    async def _set_memory(self, record: MachineRecord, limit_mib: int) -> node.MemoryState:
        size_mib = guests.resolve(record.version.config).memory_mb
        if not 1 <= limit_mib <= size_mib:
            raise InvalidRequest(
                f"must be 1 to {size_mib}, the machine's size", field="limit_mb", hint="update it with another size"
            )
        await self._host.context.driver.set_memory_limit(record.id, limit_mib)
        return await self._queries.memory(record)

    async def _exec(self, request: node.ExecMachine) -> node.ExecResult:
        if not request.argv:
            raise InvalidRequest("a command is required", field="command")
        if not 0 < request.timeout_s <= EXEC_S_MAX:
            raise InvalidRequest(f"is not between 1 and {EXEC_S_MAX:g} seconds", field="timeout")
        command = Exec(
            argv=request.argv,
            stdin_base64=request.stdin_base64,
            container=request.container,
            machine=request.machine,
            timeout_ms=int(request.timeout_s * 1000),
        )
        ended = await self._host.context.driver.exec(request.machine_id, command)
        if ended.timed_out:
            raise RequestTimeout(f"the command did not end within {request.timeout_s:g} s and was killed")
        return node.ExecResult(
            exit_code=ended.exit_code,
            signal=ended.signal,
            stdout_base64=ended.stdout_base64,
            stderr_base64=ended.stderr_base64,
            truncated=ended.truncated,
        )

    async def _alter(self, request: node.CordonMachine | node.SetMetadata | node.PatchMetadata) -> bytes:
        answer = _Answer(request.request_id)

        def guard(record: MachineRecord) -> None:
            leases.check(record, request.nonce, self._now_ms())
            version = request.version if isinstance(request, node.PatchMetadata) else None
            if version is not None and version != record.latest.instance_id:
                raise WrongState(f"machine_version: the machine is at version {record.latest.instance_id} now")

        def update(record: MachineRecord) -> MachineRecord:
            match request:
                case node.CordonMachine():
                    return replace(record, cordoned=request.cordoned)
                case node.SetMetadata():
                    return _with_metadata(record, {request.key: request.value})
                case node.PatchMetadata():
                    return _with_metadata(record, request.metadata)

        altered = await self._host.get(request.machine_id).keeper.alter(
            update,
            guard=guard,
            outcome=lambda met, wanted: answer.keep(None),
        )
        if self._host.context.policies is not None and not isinstance(request, node.CordonMachine):
            self._host.context.policies.touch(altered.app.name)
        return answer.bytes

    async def _lease(self, request: node.AcquireLease | node.ReleaseLease) -> bytes:
        answer = _Answer(request.request_id)
        now_ms = self._now_ms()

        def update(record: MachineRecord) -> MachineRecord:
            if isinstance(request, node.ReleaseLease):
                leases.release_check(record, request.nonce, now_ms)
                return replace(record, lease=None)
            return replace(
                record,
                lease=leases.acquire(
                    record,
                    nonce=request.nonce,
                    ttl_s=request.ttl_s,
                    owner=request.owner,
                    description=request.description,
                    now_ms=now_ms,
                ),
            )

        await self._host.get(request.machine_id).keeper.alter(
            update,
            outcome=lambda met, wanted: answer.keep(leases.shown(wanted.lease) if wanted.lease else None),
        )
        return answer.bytes

    def _now_ms(self) -> int:
        return unix_ms(self._host.context.clock.now())


class _Answer:
    """Made while the change is: what this request and every repetition of it gets."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self.bytes = b""

    def keep(self, result: object) -> Outcome:
        self.bytes = encode(result)
        return (self._request_id, self.bytes)


def _with_metadata(record: MachineRecord, values: dict[str, str | None]) -> MachineRecord:
    """None removes a key."""
    for key, value in values.items():
        if value is not None and len(value) > METADATA_VALUE_MAX:
            raise InvalidRequest(f"at most {METADATA_VALUE_MAX} characters", field=f"metadata.{key}")

    def changed(version: Version) -> Version:
        merged = (version.config.metadata or {}) | values
        metadata = {key: value for key, value in merged.items() if value is not None}
        if len(metadata) > METADATA_KEYS_MAX:
            raise InvalidRequest(f"at most {METADATA_KEYS_MAX} keys", field="metadata")
        return replace(version, config=replace(version.config, metadata=metadata))

    following = record.next_version
    return replace(
        record,
        version=changed(record.version),
        next_version=changed(following) if following is not None else None,
    )


def encode(result: object) -> bytes:
    return msgspec.json.encode(node.NodeReply(result=result))


def encode_error(error: PantalaError) -> bytes:
    return msgspec.json.encode(
        node.NodeReply(
            error=node.NodeError(
                kind=type(error).__name__,
                message=error.message,
                http_code=error.http_code,
                status=error.status,
                hint=error.hint,
                retry_after_s=error.retry_after_s if isinstance(error, TransientError | RateLimited) else None,
            )
        )
    )
