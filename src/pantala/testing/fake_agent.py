"""An agent in memory: the node API over a bus, machines that start at once, no processes.

For tests of the server and of the CLI: `FakeAgent(bus, "node-1")`, then `await agent.serve()`. It journals
outcomes by `request_id`, keeps leases, events and versions, and refuses what a real agent refuses. `fail_next` makes
the next call of a kind raise; `silent` makes it answer nothing, `lose_answers` makes it work but not answer;
calls wait until `hold` is set.
`exit_at_start` ends each app that starts with that code, after it has logged `last_words`; without `accepts` the ports
of what starts never do, without `answers` they do and no HTTP answer comes. `workers_end`: each look at a machine's
processes finds another one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from pantala.client.node import encode_error
from pantala.client.node import subject as subject_of
from pantala.domain import guests
from pantala.domain.answers import asked_ports
from pantala.domain.machine import SETTLED, TERMINAL, State
from pantala.errors import (
    CapacityError,
    Conflict,
    DriverBusy,
    InvalidRequest,
    LeaseHeld,
    NodeUnreachable,
    NotFound,
    PantalaError,
    RequestTimeout,
    WrongState,
)
from pantala.kit import ids
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, SystemClock, rfc3339, unix_ms
from pantala.kit.sealing import Opener
from pantala.testing.echo_streams import EchoStreams
from pantala.testing.fake_machine import FakeMachine
from pantala.testing.relayed_streams import RelayedStreams
from pantala.wire import node as wire
from pantala.wire.api import Lease, ListenSocket, LogLine, MachineVersion, ProcessStat, WaitResponse
from pantala.wire.escape import EscapeReport
from pantala.wire.feed import MachineRow, TraceRecord
from pantala.wire.machine import (
    Event,
    EventRequest,
    ExitEvent,
    LeaseView,
    Machine,
)

_REQUEST = msgspec.json.Decoder(wire.NodeRequest)


class FakeAgent:
    def __init__(
        self,
        bus: Bus,
        node: str = "node-1",
        *,
        region: str = "iad",
        zone: str = "a1b2",
        memory_mib: int = 8192,
        cpus: int = 4,
        isolation: str = "none",
        clock: Clock | None = None,
    ) -> None:
        self.node = node
        self.region = region
        self.zone = zone
        self.memory_mib = memory_mib
        self.cpus = cpus
        self.isolation = isolation
        self.details: dict[str, dict[str, Any]] = {}
        """Fields of the answer for one machine, by its id."""
        self.machines: dict[str, FakeMachine] = {}
        self._of_app: defaultdict[str, dict[str, FakeMachine]] = defaultdict(dict)
        self.calls: list[wire.NodeRequest] = []
        self.logs: list[LogLine] = []
        self.traces: dict[str, list[TraceRecord]] = {}
        self.traces_since_ms = 0
        self.secret_versions: dict[str, int] = {}
        self.silent = False
        self.lose_answers = False
        self.clock_ahead_ms = 0
        self.hold: anyio.Event | None = None
        self.fail_next: dict[type, PantalaError] = {}
        self.accepts = True
        self.answers = True
        self.workers_end = False
        self.exit_at_start: int | None = None
        self.escapes = EscapeReport(host=node, suite=None, attempts=[])
        self.executed = wire.ExecResult(exit_code=0, signal=0, stdout_base64="", stderr_base64="")
        self.last_words = ""
        self._app_secrets: dict[str, dict[str, str]] = {}
        self._outcomes: dict[str, bytes] = {}
        self.streams: EchoStreams | RelayedStreams = EchoStreams()
        self._bus = bus
        self._clock = clock or SystemClock()
        self.opener = Opener(hashlib.sha256(node.encode()).digest())
        self.fences: dict[str, int] = {}
        self._looks = 0
        self._changed = anyio.Event()
        self.on_change: Callable[[], None] = lambda: None

    async def serve(self) -> None:
        await self._bus.serve(subject_of(self.node), self.handle)

    async def handle(self, subject: str, payload: bytes) -> bytes | None:
        if self.silent:
            return None
        request = _REQUEST.decode(payload)
        self.calls.append(request)
        if self.hold is not None:
            await self.hold.wait()
        request_id = getattr(request, "request_id", None)
        if request_id is not None and request_id in self._outcomes:
            return None if self.lose_answers else self._outcomes[request_id]
        try:
            if error := self.fail_next.pop(type(request), None):
                raise error
            reply = wire.NodeReply(result=await self._carry_out(request))
        except PantalaError as error:
            reply = wire.NodeReply(error=encode_error(error))
        answer = msgspec.json.encode(reply)
        if request_id is not None and reply.error is None:
            self._outcomes[request_id] = answer
            self.on_change()
        return None if self.lose_answers else answer

    async def _carry_out(self, request: wire.NodeRequest) -> Any:
        match request:
            case wire.OpenSsh() | wire.ReadStream() | wire.WriteStream() | wire.CloseStream():
                return await self.streams.answer(request, self._machine)
            case wire.CreateMachine():
                return self._create(request)
            case wire.UpdateMachine():
                return self._update(request)
            case wire.StartMachine():
                machine = self._held(request.machine_id, request.nonce)
                before = machine.state
                self._start(machine, "start")
                return wire.StartResult(previous_state=before.value)
            case wire.StopMachine():
                self._exit(self._held(request.machine_id, request.nonce), requested=True)
            case wire.RestartMachine():
                machine = self._held(request.machine_id, request.nonce)
                self._exit(machine, requested=True)
                self._start(machine, "restart")
            case wire.SuspendMachine():
                machine = self._held(request.machine_id, request.nonce)
                if machine.state is not State.STARTED:
                    raise WrongState(f"machine is {machine.state}; only a started one suspends")
                self._move(machine, State.SUSPENDED, "suspend")
            case wire.SignalMachine():
                self._held(request.machine_id, request.nonce).signals.append(request.signal)
            case wire.ExecMachine():
                if self._held(request.machine_id, request.nonce).state is not State.STARTED:
                    raise WrongState("the machine does not run")
                return self.executed
            case wire.SetMemory():
                machine = self._held(request.machine_id, request.nonce)
                size_mib = guests.resolve(machine.config).memory_mb
                if machine.state is not State.STARTED:
                    raise WrongState(f"machine is {machine.state}, not started")
                if not 1 <= request.limit_mib <= size_mib:
                    raise InvalidRequest(f"must be 1 to {size_mib}, the machine's size", field="limit_mb")
                machine.memory_mib = request.limit_mib
                return wire.MemoryState(limit_mib=request.limit_mib, available_mib=request.limit_mib)
            case wire.ReclaimMemory():
                self._held(request.machine_id, request.nonce)
                return wire.ReclaimedMemory(actual_mib=min(request.amount_mib, 7))
            case wire.DestroyMachine():
                self._destroy(request)
            case wire.CordonMachine():
                self._held(request.machine_id, request.nonce).cordoned = request.cordoned
            case wire.SetMetadata():
                self._set_metadata(self._held(request.machine_id, request.nonce), {request.key: request.value})
            case wire.PatchMetadata():
                machine = self._held(request.machine_id, request.nonce)
                if request.version not in (None, machine.instance_id):
                    raise WrongState(f"machine_version: the machine is at version {machine.instance_id} now")
                self._set_metadata(machine, request.metadata)
            case wire.PutSecrets():
                self._take_secrets(request.secrets)
            case wire.AcquireLease():
                return self._acquire(request)
            case wire.ReleaseLease():
                machine = self._held(request.machine_id, request.nonce)
                if machine.lease is None:
                    raise NotFound("lease not found")
                machine.lease = None
            case wire.PublishMachine():
                self._publish(request)
            case wire.FenceMachine():
                self._fence(request)
            case wire.GetLease():
                lease = self._live_lease(self._machine(request.machine_id))
                if lease is None:
                    raise NotFound("lease not found")
                return lease
            case wire.GetMachine():
                known = self._machine(request.machine_id)
                return msgspec.structs.replace(self._shown(known), **self.details.get(known.id, {}))
            case wire.ListMachines():
                gone = None if request.include_deleted else State.DESTROYED
                asked = self.machines if request.app is None else self._of_app[request.app]
                return [self._shown(machine) for machine in asked.values() if machine.state != gone]
            case wire.WaitMachine():
                return await self._wait(request)
            case wire.ListEvents():
                return self._machine(request.machine_id).events[: request.limit]
            case wire.ListVersions():
                return self._versions(self._machine(request.machine_id))
            case wire.GetMemory():
                machine = self._machine(request.machine_id)
                limit_mib = machine.memory_mib or guests.resolve(machine.config).memory_mb
                return wire.MemoryState(limit_mib=limit_mib, available_mib=limit_mib)
            case wire.ListProcesses():
                return self._processes(self._machine(request.machine_id))
            case wire.ReadLogs():
                return self._read_logs(request)
            case wire.TraceRequest():
                return wire.HostTrace(since_ms=self.traces_since_ms, records=self.traces.get(request.request, []))
            case wire.RunEscapeSuite() | wire.GetEscapeSuite():
                return self.escapes
            case wire.GetNode():
                return self.info()

    # -- the life of a machine -----------------------------------------------------------------------------------

    def _create(self, request: wire.CreateMachine) -> Machine:
        self._check_generation(request)
        if request.expires_at_ms and self.now_ms() > request.expires_at_ms:
            raise NodeUnreachable(f"{self.node} got to the request too late")
        known = self.machines.get(request.machine_id)
        if known is not None and known.generation >= request.generation:
            return known.document()
        memory_mib = (request.config.guest.memory_mb if request.config.guest else None) or 256
        if memory_mib > self._memory_free():
            raise CapacityError(f"{self.node} has {self._memory_free()} MiB left")
        if request.secrets is not None:
            self._take_secrets(request.secrets)
        slot = len(self.machines) + 1
        network = f"fdaa:{request.app.network >> 16:x}:{request.app.network & 0xFFFF:x}"
        machine = FakeMachine(request, node=self.node, ip=f"{network}:a7b:1:0:{slot:x}:2", now=self._now())
        machine.hidden = request.hidden
        self.machines[machine.id] = self._of_app[machine.app.name][machine.id] = machine
        self._record(machine, "launch", State.CREATED)
        if not request.skip_launch:
            self._start(machine, "start")
        elif request.generation > 1:
            self._move(machine, State.STOPPED, "stop")
        if request.lease_ttl_s:
            machine.lease = self._new_lease(machine, request.lease_ttl_s, request.owner, "")
        return machine.document(nonce=machine.lease.nonce if machine.lease else None)

    def _check_generation(self, request: wire.CreateMachine) -> None:
        if request.generation < self.fences.get(request.machine_id, 0):
            raise Conflict(f"{request.machine_id} was placed elsewhere since")
        known = self.machines.get(request.machine_id)
        if known is not None and known.state not in TERMINAL and known.generation < request.generation:
            raise DriverBusy(f"an older copy of {known.id} is still on its way out here")

    def _publish(self, request: wire.PublishMachine) -> None:
        machine = self._machine(request.machine_id)
        if machine.generation != request.generation or machine.state in TERMINAL:
            raise Conflict(f"generation {request.generation} of {machine.id} is not here (any more)")
        machine.hidden = False

    def _fence(self, request: wire.FenceMachine) -> None:
        before = self.fences.get(request.machine_id, 0)
        self.fences[request.machine_id] = max(before, request.generation)
        machine = self.machines.get(request.machine_id)
        if machine is not None and machine.generation < request.generation and machine.state not in TERMINAL:
            self._move(machine, State.MIGRATED, "migrate")

    def _update(self, request: wire.UpdateMachine) -> Machine:
        machine = self._held(request.machine_id, request.nonce)
        if request.current_version and request.current_version != machine.instance_id:
            raise WrongState(f"current_version: the machine has version {machine.instance_id} now")
        if request.secrets is not None:
            self._take_secrets(request.secrets)
        before = machine.state
        machine.older.insert(0, self._version(machine, "replaced"))
        machine.config, machine.image, machine.instance_id = request.config, request.image, ids.ulid()
        self._record(machine, "update", machine.state)
        if before == State.STARTED and not request.skip_launch:
            self._start(machine, "start")
        elif before == State.STARTED:
            self._move(machine, State.STOPPED, "stop")
        if request.lease_ttl_s and machine.lease is None:
            machine.lease = self._new_lease(machine, request.lease_ttl_s, request.owner, "")
        return machine.document(nonce=machine.lease.nonce if machine.lease else None)

    def _version(self, machine: FakeMachine, status: str) -> MachineVersion:
        return MachineVersion(
            version=machine.instance_id, user_config=machine.config, status=status, created_at=machine.updated_at
        )

    def _versions(self, machine: FakeMachine) -> list[MachineVersion]:
        return [self._version(machine, "current"), *machine.older]

    def _destroy(self, request: wire.DestroyMachine) -> None:
        machine = self._held(request.machine_id, request.nonce)
        if machine.state == State.STARTED and not request.force:
            raise WrongState(f"the machine {machine.id} is started; stop it first or destroy it with force")
        machine.lease = None
        self._move(machine, State.DESTROYED, "destroy")

    def _start(self, machine: FakeMachine, event: str) -> None:
        self._move(machine, State.STARTED, event)
        if self.exit_at_start is not None:
            if self.last_words:
                self.say(machine.id, self.last_words)
            self.crash(machine.id, code=self.exit_at_start)
        elif machine.config.services and self.accepts:
            self._record(machine, "ready", State.STARTED)
            if asked_ports(machine.config) and self.answers:
                self.answer(machine)

    def answer(self, machine: FakeMachine) -> None:
        """It has been asked and has answered."""
        reason = "GET / was answered with 200 on port 8080"
        event = Event(
            id=ids.ulid(),
            type="answer",
            status="answered",
            source="flyd",
            timestamp=unix_ms(self._clock.now()),
            request=EventRequest(reason=reason),
        )
        machine.events.insert(0, event)

    def _exit(self, machine: FakeMachine, *, requested: bool, code: int = 0) -> None:
        record = ExitEvent(
            exit_code=code,
            guest_exit_code=code,
            guest_signal=-1,
            oom_killed=False,
            requested_stop=requested,
            restarting=False,
            signal=-1,
            exited_at=self._now(),
        )
        self._move(machine, State.STOPPED, "exit", EventRequest(exit_event=record, restart_count=0))

    def crash(self, machine_id: str, *, code: int) -> None:
        """The app ends by itself."""
        machine = self._machine(machine_id)
        self._exit(machine, requested=False, code=code)
        if machine.config.auto_destroy:
            self._move(machine, State.DESTROYED, "destroy")

    def say(self, machine_id: str, message: str) -> None:
        """A line in the app's log."""
        machine = self._machine(machine_id)
        self.logs.append(
            LogLine(
                timestamp=self._now().replace("Z", f"{len(self.logs):06d}Z"),
                message=message,
                level="info",
                instance=machine_id,
                region=machine.region,
                provider="app",
            )
        )

    def say_at_the_edge(self, app: str, message: str) -> None:
        """A line of this host's proxy about a client of the app, whose machines may be elsewhere."""
        timestamp = self._now().replace("Z", f"{len(self.logs):06d}Z")
        instance = f"proxy of {app}"
        self.logs.append(
            LogLine(
                timestamp=timestamp,
                message=message,
                level="error",
                instance=instance,
                region=self.region,
                provider="proxy",
            )
        )

    def row(self, machine_id: str) -> MachineRow | None:
        """As its agent publishes it."""
        machine = self.machines.get(machine_id)
        if machine is None or machine.state in TERMINAL or machine.hidden:
            return None
        return MachineRow(
            id=machine.id,
            app=machine.app.name,
            region=machine.region,
            node=self.node,
            instance_id=machine.instance_id,
            generation=machine.generation,
            state=machine.state.value,
            ip4="",
            ip6=machine.ip,
            services=[],
            passing=[],
            cordoned=machine.cordoned,
        )

    def secrets_of(self, app: str) -> dict[str, str]:
        return self._app_secrets.get(app, {})

    # -- parts ---------------------------------------------------------------------------------------------------

    def _machine(self, machine_id: str) -> FakeMachine:
        if machine_id not in self.machines:
            raise NotFound("machine not found")
        return self.machines[machine_id]

    def _held(self, machine_id: str, nonce: str) -> FakeMachine:
        """The machine, unless somebody else has its lease."""
        machine = self._machine(machine_id)
        if machine.state in TERMINAL:
            raise NotFound("machine not found")
        lease = self._live_lease(machine)
        if lease is not None and lease.nonce != nonce:
            raise LeaseHeld(f"lease currently held by {lease.owner}, expires at {lease.expires_at}")
        if lease is None and nonce:
            machine.lease = None
        return machine

    def _shown(self, machine: FakeMachine) -> Machine:
        lease = self._live_lease(machine)
        if lease is None:
            return machine.document()
        view = LeaseView(description=lease.description, expires_at=lease.expires_at, owner=lease.owner)
        return msgspec.structs.replace(machine.document(), lease=view)

    def _live_lease(self, machine: FakeMachine) -> Lease | None:
        if machine.lease is not None and machine.lease.expires_at * 1000 <= unix_ms(self._clock.now()):
            machine.lease = None
        return machine.lease

    def _acquire(self, request: wire.AcquireLease) -> Lease:
        machine = self._held(request.machine_id, request.nonce)
        if machine.lease is not None:
            machine.lease = msgspec.structs.replace(machine.lease, expires_at=self._in(request.ttl_s))
        else:
            machine.lease = self._new_lease(machine, request.ttl_s, request.owner, request.description)
        return machine.lease

    def _new_lease(self, machine: FakeMachine, ttl_s: int, owner: str, description: str) -> Lease:
        return Lease(
            nonce=ids.token("nonce", entropy_bytes=6),
            expires_at=self._in(ttl_s),
            owner=owner,
            description=description,
            version=machine.instance_id,
        )

    def _in(self, ttl_s: int) -> int:
        return unix_ms(self._clock.now()) // 1000 + ttl_s

    def _set_metadata(self, machine: FakeMachine, values: dict[str, str | None]) -> None:
        merged = (machine.config.metadata or {}) | values
        metadata = {key: value for key, value in merged.items() if value is not None}
        machine.config = msgspec.structs.replace(machine.config, metadata=metadata or None)

    def _take_secrets(self, sealed: wire.SealedSecrets) -> None:
        if self.secret_versions.get(sealed.app, -1) < sealed.version:
            self.secret_versions[sealed.app] = sealed.version
            self._app_secrets[sealed.app] = msgspec.json.decode(self.opener.open(sealed.sealed))

    async def _wait(self, request: wire.WaitMachine) -> WaitResponse:
        machine = self._machine(request.machine_id)
        wanted = {state.value for state in SETTLED} if "settled" in request.states else set(request.states)
        with anyio.move_on_after(request.timeout_s):
            while machine.state.value not in wanted:
                if machine.state == State.DESTROYED:
                    raise NotFound("machine not found")
                await self._changed.wait()
        if machine.state.value not in wanted:
            raise RequestTimeout(
                f"machine failed to reach desired state {', '.join(request.states)}; it is {machine.state.value}"
            )
        event_id = machine.events[0].id if machine.events else ""
        return WaitResponse(ok=True, state=machine.state.value, version=machine.instance_id, event_id=event_id)

    def _processes(self, machine: FakeMachine) -> list[ProcessStat]:
        if machine.state != State.STARTED:
            return []
        self._looks += self.workers_end
        sockets = [
            ListenSocket(proto="tcp", address=f"[::]:{service.internal_port}")
            for service in machine.config.services or []
        ]
        return [
            ProcessStat(
                pid=pid, command=command, directory="/", cpu=0, rss=4096 * pid, rtime=1, stime=0, listen_sockets=listen
            )
            for pid, command, listen in ((1, "pantala-init", []), (2 + self._looks, "app", sockets))
        ]

    def _read_logs(self, request: wire.ReadLogs) -> list[LogLine]:
        from pantala.control.logs import nanoseconds

        mine = {machine.id for machine in self.machines.values() if machine.app.name == request.app}
        mine.add(f"proxy of {request.app}")
        lines = [
            line
            for line in self.logs
            if line.instance in mine
            and request.machine_id in (None, line.instance)
            and nanoseconds(line.timestamp) > request.since_ns
        ]
        return lines[-request.limit :]

    def info(self) -> wire.NodeInfo:
        return wire.NodeInfo(
            id=self.node,
            region=self.region,
            zone=self.zone,
            version="test",
            driver="fake",
            isolation=self.isolation,
            sealing_key=self.opener.public_key,
            cpus=self.cpus,
            cpus_free=float(self.cpus),
            memory_mib=self.memory_mib,
            memory_mib_free=self._memory_free(),
            disk_mib_free=100_000,
        )

    def _memory_free(self) -> int:
        used = sum(
            (machine.config.guest.memory_mb if machine.config.guest else None) or 256
            for machine in self.machines.values()
            if machine.state not in TERMINAL
        )
        return self.memory_mib - used

    def _move(self, machine: FakeMachine, state: State, event: str, request: EventRequest | None = None) -> None:
        machine.state = state
        self._record(machine, event, state, request)

    def _record(self, machine: FakeMachine, event: str, state: State, request: EventRequest | None = None) -> None:
        machine.updated_at = self._now()
        machine.events.insert(
            0,
            Event(
                id=ids.ulid(),
                type=event,
                status=state.value,
                source="user" if event != "exit" else "flyd",
                timestamp=unix_ms(self._clock.now()),
                request=request,
            ),
        )
        self._changed.set()
        self._changed = anyio.Event()

    def now_ms(self) -> int:
        return unix_ms(self._clock.now()) + self.clock_ahead_ms

    def _now(self) -> str:
        return rfc3339(self._clock.now())
