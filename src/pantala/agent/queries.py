"""What the node API answers without changing anything."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import anyio
import msgspec

from pantala.agent import leases, overdue, view
from pantala.agent.escape import EscapeSuites
from pantala.agent.health import shown
from pantala.agent.host import Host
from pantala.domain import guests
from pantala.domain.machine import SETTLED, TERMINAL, State
from pantala.errors import InternalError, InvalidRequest, RequestTimeout
from pantala.journal import MachineRecord
from pantala.kit.clock import rfc3339_ms, unix_ms
from pantala.wire import node
from pantala.wire.api import ListenSocket, LogLine, MachineVersion, ProcessStat, WaitResponse
from pantala.wire.machine import CheckStatus, ContainerStatus, Event, Machine, MachineCPU, Progress

WAIT_S_MAX = 60.0
EVENTS_SHOWN = 20
VERSION = metadata.version("pantala")
"""Read once: it is parsed from files."""

Trace = Callable[[str], Awaitable[node.HostTrace]]
ReadLines = Callable[[node.ReadLogs], Awaitable[list[LogLine]]]


class Queries:
    def __init__(
        self,
        host: Host,
        *,
        read_logs: ReadLines,
        trace: Trace,
        state_dir: Path,
        zone: str,
        cpu: Callable[[str], MachineCPU | None] = lambda machine_id: None,
        why_awake: Callable[[str], list[str]] = lambda machine_id: [],
        escapes: EscapeSuites | None = None,
    ) -> None:
        self._host = host
        self._cpu = cpu
        self._why_awake = why_awake
        self._escapes = escapes
        self._read_logs = read_logs
        self._trace = trace
        self._state_dir = state_dir
        self._zone = zone

    async def answer(self, request: Any) -> object:
        match request:
            case node.GetMachine():
                return await self._machine(await self._host.find_record(request.machine_id))
            case node.ListMachines():
                return await self._list(request)
            case node.WaitMachine():
                return await self._wait(request)
            case node.ListEvents():
                await self._host.find_record(request.machine_id)
                return await self._host.context.journal.events(request.machine_id, min(max(request.limit, 1), 200))
            case node.ListVersions():
                return await self._versions(await self._host.find_record(request.machine_id))
            case node.GetLease():
                now_ms = unix_ms(self._host.context.clock.now())
                return leases.shown(leases.get(self._host.get(request.machine_id).record, now_ms))
            case node.GetMemory():
                return await self.memory(await self._host.find_record(request.machine_id))
            case node.ListProcesses():
                return await self._processes(request.machine_id)
            case node.ReadLogs():
                return await self._read_logs(request)
            case node.TraceRequest():
                return await self._trace(request.request)
            case node.GetNode():
                return self.node()
            case node.RunEscapeSuite():
                return await self._escape_suites().run()
            case node.GetEscapeSuite():
                return self._escape_suites().report()
            case _:
                raise InternalError(f"nobody answers {type(request).__name__}")

    def document(
        self,
        record: MachineRecord,
        *,
        nonce: str | None = None,
        events: list[Event] | None = None,
        checks: list[CheckStatus] | None = None,
        containers: list[ContainerStatus] | None = None,
    ) -> Machine:
        lease = leases.current(record, unix_ms(self._host.context.clock.now()))
        return view.machine(
            record,
            lease=leases.without_nonce(lease) if lease is not None else None,
            node=self._host.context.node,
            isolation=self._host.context.driver.isolation,
            events=events or [],
            checks=checks or [],
            containers=containers,
            nonce=nonce,
            cpu=self._cpu(record.id),
        )

    async def events(self, machine_id: str) -> list[Event]:
        """Newest first, as many as the document of a machine shows."""
        return await self._host.context.journal.events(machine_id, EVENTS_SHOWN)

    async def _machine(self, record: MachineRecord) -> Machine:
        events = await self.events(record.id)
        record = self._newest(record)
        shown = self._shown(record, events)
        if record.state in TERMINAL:
            return shown
        details = self._host.context.driver.isolated(record.uid_base)
        if self._escapes is not None:
            details = msgspec.structs.replace(details, escape_suite=self._escapes.last(details))
        return msgspec.structs.replace(
            shown,
            isolation_details=details,
            progress=self._progress(record),
            awake_because=self._why_awake(record.id) or None,
        )

    def _escape_suites(self) -> EscapeSuites:
        if self._escapes is None:
            raise InternalError("this agent was composed without an escape suite")
        return self._escapes

    def _newest(self, record: MachineRecord) -> MachineRecord:
        """After its events were read: a record must not be older than they are."""
        task = self._host.machines.get(record.id)
        return task.record if task is not None else record

    def _progress(self, record: MachineRecord) -> Progress | None:
        lasts_s = overdue.may_last(record)
        if not lasts_s or not record.state_since_ms:
            return None
        task = self._host.machines.get(record.id)
        return Progress(
            since=rfc3339_ms(record.state_since_ms),
            asked_by=overdue.asked_by(record),
            waits_for=(task.doing if task is not None else "") or overdue.waits_for(record),
            stuck_at=rfc3339_ms(record.state_since_ms + int(lasts_s * 1000)),
        )

    def _shown(self, record: MachineRecord, events: list[Event]) -> Machine:
        task = self._host.machines.get(record.id)
        return self.document(
            record,
            events=events,
            checks=task.keeper.checks() if task is not None else [],
            containers=task.keeper.containers() if task is not None else None,
        )

    async def _list(self, request: node.ListMachines) -> list[Machine]:
        """Two turns of the journal however many machines: one for each of them would wait for every writer."""
        app, journal = request.app, self._host.context.journal
        wanted = [task.record for task in self._host.machines.values() if app is None or task.record.app.name == app]
        if request.include_deleted:
            live = {record.id for record in wanted}
            wanted += [record for record in await journal.destroyed(app) if record.id not in live]
        events = await journal.events_of([record.id for record in wanted], EVENTS_SHOWN)
        wanted.sort(key=lambda record: record.created_at_ms)
        return [self._shown(self._newest(record), events[record.id]) for record in wanted]

    async def _wait(self, request: node.WaitMachine) -> WaitResponse:
        for state in request.states:
            if state != "settled" and state not in list(State):
                raise InvalidRequest(f"{state!r} is not a state", field="state")
        record = await self._host.find_record(request.machine_id)
        task = self._host.machines.get(request.machine_id)
        with anyio.move_on_after(min(max(request.timeout_s, 0.0), WAIT_S_MAX)):
            while True:
                changed = task.keeper.changed() if task is not None else None
                last_event_id = task.keeper.last_event_id if task is not None else ""
                record = task.record if task is not None else record
                if state := await self._version_state(record, request):
                    return WaitResponse(ok=True, state=state, version=request.version or "", event_id=last_event_id)
                if _holds(record, request, last_event_id):
                    return WaitResponse(
                        ok=True, state=str(record.state), version=record.version.instance_id, event_id=last_event_id
                    )
                if changed is None or record.state in TERMINAL:
                    break
                await changed.wait()
        raise RequestTimeout(_not_reached(record, request, task.keeper.last_event_id if task is not None else ""))

    async def _versions(self, record: MachineRecord) -> list[MachineVersion]:
        """Those that are kept, newest first; a version that never came counts as replaced."""
        known = {version.instance_id: version for version in await self._host.context.journal.versions(record.id)}
        for version in (record.version, record.next_version):
            if version is not None:
                known[version.instance_id] = version
        return [
            MachineVersion(
                version=version.instance_id,
                user_config=version.config,
                status=_version_status(record, version.instance_id),
                created_at=rfc3339_ms(version.created_at_ms),
            )
            for version in sorted(known.values(), key=lambda version: version.instance_id, reverse=True)
        ]

    async def _version_state(self, record: MachineRecord, request: node.WaitMachine) -> str:
        """`replacing` or `replaced` when that is waited for and so: states of a version that another one follows."""
        wanted = {"replacing", "replaced"} & set(request.states)
        if not wanted or request.version is None:
            return ""
        if request.version == record.version.instance_id:
            state = "replacing" if record.next_version is not None else ""
        else:
            kept = await self._host.context.journal.versions(record.id)
            was_here = any(version.instance_id == request.version for version in kept)
            state = "replaced" if was_here and record.latest.instance_id != request.version else ""
        return state if state in wanted else ""

    async def memory(self, record: MachineRecord) -> node.MemoryState:
        """Now, of a started machine; else what it starts with."""
        usage = await self._host.context.driver.memory(record.id) if record.state is State.STARTED else None
        if usage is None:
            size_mib = guests.resolve(record.version.config).memory_mb
            return node.MemoryState(limit_mib=size_mib, available_mib=size_mib)
        available_mib = min(max(usage.limit_mib - usage.used_mib, 0), usage.limit_mib)
        return node.MemoryState(limit_mib=usage.limit_mib, available_mib=available_mib)

    async def _processes(self, machine_id: str) -> list[ProcessStat]:
        """What lives in a started machine, each with the sockets that it holds open."""
        record = self._host.get(machine_id).record
        if record.state is not State.STARTED:
            return []
        context = self._host.context
        sockets = await context.network.listening(machine_id)
        processes = await context.driver.processes(machine_id)
        now_s = context.clock.now().timestamp()
        return [
            ProcessStat(
                pid=process.pid,
                command=process.command,
                directory=process.directory,
                cpu=process.cpu_ticks,
                rss=process.rss_bytes,
                rtime=int(process.runs_s),
                stime=round(now_s - process.runs_s),
                listen_sockets=[
                    ListenSocket(proto=socket.proto, address=shown(socket))
                    for socket in sockets
                    if socket.inode in process.sockets
                ],
            )
            for process in processes
        ]

    def node(self) -> node.NodeInfo:
        context, capacity = self._host.context, self._host.capacity
        cpus, memory_mib = self._host.used()
        return node.NodeInfo(
            id=context.node,
            region=context.region,
            zone=self._zone,
            version=VERSION,
            driver=context.driver.name,
            isolation=context.driver.isolation,
            sealing_key=context.node_key.public_key,
            cpus=capacity.cpus,
            cpus_free=max(capacity.cpus - cpus, 0.0),
            memory_mib=capacity.memory_mib,
            memory_mib_free=max(capacity.memory_mib - memory_mib, 0),
            disk_mib_free=shutil.disk_usage(self._state_dir).free // (1 << 20),
        )


def _version_status(record: MachineRecord, instance_id: str) -> str:
    if instance_id == record.version.instance_id:
        return "current"
    pending = record.next_version is not None and record.next_version.instance_id == instance_id
    return "pending" if pending else "replaced"


def _not_reached(record: MachineRecord, request: node.WaitMachine, last_event_id: str) -> str:
    """With the words that clients match; a version only where one was asked for and another is there, the event only
    where nothing came after it."""
    wanted, found = " or ".join(request.states), str(record.state)
    if request.version is not None and request.version != record.version.instance_id:
        wanted, found = f"{wanted} at version {request.version}", f"{found} at version {record.version.instance_id}"
    why = f" ({record.reason})" if record.reason else ""
    if request.from_event_id is not None and request.from_event_id == last_event_id:
        wanted, found = f"{wanted} after event {request.from_event_id}", f"{found} since"
    return f"machine failed to reach desired state {wanted}, it is {found}{why}"


def _holds(record: MachineRecord, request: node.WaitMachine, last_event_id: str) -> bool:
    """Levels, not edges. A state that accepted requests are about to end does not count as reached."""
    if request.version is not None and record.version.instance_id != request.version:
        return False
    if request.from_event_id is not None and last_event_id == request.from_event_id:
        return False
    if (
        record.state in SETTLED
        and record.state not in TERMINAL
        and (record.queued() or record.desired.goal == "created")
    ):
        return False
    return str(record.state) in request.states or ("settled" in request.states and record.state in SETTLED)
