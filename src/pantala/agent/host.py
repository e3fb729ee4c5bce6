"""The machines of this host: adopting those that are there, taking new ones, room for them. One per agent."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator

import anyio
import msgspec
import structlog
from anyio.abc import TaskGroup

from pantala.agent import addresses, holds
from pantala.agent.context import Callers, Context, NoCallers, ProxyLink
from pantala.agent.events import event
from pantala.agent.keeper import Keeper, Outcome
from pantala.agent.machine import MachineTask
from pantala.domain import guests, validate
from pantala.domain.machine import TERMINAL, State
from pantala.errors import CapacityError, Conflict, DriverBusy, NodeUnreachable, NotFound, PantalaError
from pantala.journal import Change, Desired, LeaseRecord, MachineRecord, Version
from pantala.kit.clock import unix_ms
from pantala.kit.ids import ulid
from pantala.kit.rows import Row
from pantala.kit.sealing import seal
from pantala.wire.machine import Event
from pantala.wire.node import CreateMachine, UpdateMachine

log = structlog.get_logger()

MakeOutcome = Callable[[MachineRecord, Event], Outcome | None]
_HOLDS_ROOM = frozenset(
    {
        State.STARTED,
        State.STARTING,
        State.RESTARTING,
        State.STOPPING,
        State.UPDATING,
        State.SUSPENDING,
        State.SUSPENDED,
    }
)
"""A suspended machine keeps its memory and its place; a stopped one may find the host full when it starts."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What machines may use of this host. Shared CPUs count with their promised share."""

    cpus: int
    memory_mib: int
    machines_max: int = 1000


class Host:
    """`newest`: the generation that another host shows of a machine, 0 when none does (`agent/fencing.py`)."""

    def __init__(
        self,
        context: Context,
        tasks: TaskGroup,
        proxy: ProxyLink,
        *,
        capacity: Capacity,
        pool4: str,
        newest: Callable[[str], int] = lambda machine_id: 0,
    ) -> None:
        self.context = context
        self.capacity = capacity
        self.machines: dict[str, MachineTask] = {}
        self.revision = 0
        """Another one after each change of a record (`agent/subset.py`)."""
        self._used: tuple[int, dict[str, guests.Size]] = (-1, {})
        self._tasks = tasks
        self._proxy = proxy
        self._pool4 = pool4
        self._creating = anyio.Lock()
        self._newest = newest
        self._fences: dict[str, int] = {}
        self.callers: Callers = NoCallers()
        self._service_keys: set[str] = set()
        self._extra: tuple[Row, ...] = ()

    # -- at start ------------------------------------------------------------------------------------------------------

    async def adopt(self) -> str:
        """Take over what another agent left: resume, undo, remove what belongs to nobody. One sentence of what."""
        await self.context.network.setup()
        self._fences = await self.context.journal.fences()
        for record in await self.context.journal.live():
            newest = await self.context.journal.events(record.id, 1)
            self.machines[record.id] = self._task(record, newest[0].id if newest else "")
        self._written()
        await self._fence_known()
        running = sum(task.record.state is State.STARTED for task in self.machines.values())
        for task in self.machines.values():
            await self._adopt_one(task)
        orphans = await self._remove_orphans()
        rows = [row for task in self.machines.values() for row in task.keeper.rows()]
        self._service_keys = {row.key for row in rows if row.key.startswith("svc/")}
        await self.context.rows.replace_all([*rows, *self._extra])
        for task in self.machines.values():
            self._tasks.start_soon(self._run, task)
        return f"{len(self.machines)} machines, {running} of them started; {orphans} leftovers removed"

    async def _fence_known(self) -> None:
        """Before anything is started: what was placed elsewhere while this host had no agent."""
        for task in self.machines.values():
            generation = task.record.generation
            floor = generation + 1 if self.is_void else self._floor(task.record.id)
            if generation < floor:
                await self.fence(task.record.id, floor)

    async def announce(self, rows: Iterable[Row]) -> None:
        """Publish rows of this host besides those of its machines."""
        self._extra = tuple(rows)
        await self.context.rows.put(self._extra)

    async def _adopt_one(self, task: MachineTask) -> None:
        try:
            await task.adopt()
        except PantalaError as error:
            log.warning("machine was not adopted; its task tries again", machine=task.record.id, error=str(error))

    async def _remove_orphans(self) -> int:
        orphans = {*await self.context.driver.list()} - self.machines.keys()
        links = {*await self.context.network.list()} - self.machines.keys()
        for machine_id in sorted(orphans | links):
            log.warning("removing what belongs to no machine", machine=machine_id)
            try:
                await self.context.driver.destroy(machine_id)
                await self.context.network.remove(machine_id)
            except PantalaError as error:
                log.warning("leftover stays", machine=machine_id, error=str(error))
        return len(orphans | links)

    def _task(self, record: MachineRecord, last_event_id: str) -> MachineTask:
        keeper = Keeper(self.context, record, last_event_id)
        keeper.written = self._written
        return MachineTask(self.context, keeper, self._proxy, self._tasks, self.callers)

    def _written(self) -> None:
        self.revision += 1

    async def _run(self, task: MachineTask) -> None:
        await task.run()
        self.machines.pop(task.record.id, None)
        self._written()
        await self.tidy_rows()

    async def tidy_rows(self) -> None:
        """Delete rows of services that no machine has any more."""
        used = {row.key for task in self.machines.values() for row in task.keeper.rows() if row.key.startswith("svc/")}
        gone, self._service_keys = self._service_keys - used, used
        if gone:
            await self.context.rows.put([Row("routes", key, None) for key in sorted(gone)])

    # -- machines ------------------------------------------------------------------------------------------------------

    def get(self, machine_id: str) -> MachineTask:
        task = self.machines.get(machine_id)
        if task is None:
            raise NotFound("machine not found")
        return task

    async def find_record(self, machine_id: str) -> MachineRecord:
        """Also of a destroyed machine, while its history is kept."""
        task = self.machines.get(machine_id)
        record = task.record if task is not None else await self.context.journal.find(machine_id)
        if record is None:
            raise NotFound("machine not found")
        return record

    async def create(self, request: CreateMachine, make_outcome: MakeOutcome) -> MachineRecord:
        """Journal a new machine and give it its task; one that is known already is left as it is, without an outcome.

        Raises InvalidRequest, CapacityError, NodeUnreachable (too late); nothing is then done.
        """
        validate.validate_config(request.config)
        async with self._creating:
            self._check_generation(request)
            self._check_in_time(request)
            known = await self.context.journal.find(request.machine_id)
            if known is not None and (known.generation >= request.generation or known.state not in TERMINAL):
                if known.generation < request.generation:
                    raise DriverBusy(f"an older copy of {known.id} is still on its way out here")
                return known
            self.check_isolation(guests.resolve(request.config))
            if not request.skip_launch:
                self.check_room(guests.resolve(request.config))
            if len(self.machines) >= self.capacity.machines_max:
                raise CapacityError(f"this host holds {len(self.machines)} machines already", excluded={"machines": 1})
            record = self._new_record(request)
            launched = event("launch", "created", "user", record.created_at_ms)
            await self.context.journal.commit(
                Change(
                    machine=record,
                    events=(launched,),
                    versions=(record.version,),
                    secrets=request.secrets,
                    outcome=make_outcome(record, launched),
                    at_ms=record.created_at_ms,
                )
            )
            task = self._task(record, launched.id)
            self.machines[record.id] = task
            self._written()
        await task.keeper.publish()
        self._service_keys |= {row.key for row in task.keeper.rows() if row.key.startswith("svc/")}
        self._tasks.start_soon(self._run, task)
        return record

    def _new_record(self, request: CreateMachine) -> MachineRecord:
        machine_id, now_ms = request.machine_id, int(self.context.clock.now().timestamp() * 1000)
        version = self.new_version(request, now_ms)
        chosen = addresses.choose(
            used=[task.record.slot for task in self.machines.values()],
            machine_id=machine_id,
            network=request.app.network,
            node=self.context.node,
            pool4=self._pool4,
        )
        lease = None
        if request.lease_ttl_s > 0:
            lease = LeaseRecord(
                nonce=secrets.token_hex(8),
                owner=request.owner,
                description="",
                expires_at_ms=now_ms + request.lease_ttl_s * 1000,
                version=version.instance_id,
            )
        return MachineRecord(
            id=machine_id,
            app=request.app,
            name=request.name,
            region=request.region,
            generation=request.generation,
            version=version,
            desired=Desired(goal="created" if request.skip_launch else "started"),
            state=State.CREATED,
            slot=chosen.slot,
            ip4=chosen.ip4,
            gateway4=chosen.gateway4,
            ip6=chosen.ip6,
            uid_base=chosen.uid_base,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            cordoned=request.cordoned,
            lease=lease,
            hidden=request.hidden,
        )

    def new_version(self, request: CreateMachine | UpdateMachine, now_ms: int) -> Version:
        """What a request asks to run; its pull token only as this node can open it."""

        def sealed(token: str) -> str:
            return seal(self.context.node_key.public_key, token.encode()) if token else ""

        others = {
            name: msgspec.structs.replace(other, pull_token=sealed(other.pull_token))
            for name, other in request.other_images.items()
        }
        return Version(
            instance_id=ulid(now_ms),
            config=validate.normalized(request.config),
            image=request.image,
            created_at_ms=now_ms,
            pull_token=sealed(request.pull_token),
            other_images=others,
            min_secrets_version=request.min_secrets_version,
        )

    # -- fencing -------------------------------------------------------------------------------------------------------

    async def fence(self, machine_id: str, generation: int, outcome: Outcome | None = None) -> None:
        """Copies of a machine below `generation` never run here again, whoever asks; on disk when it returns."""
        async with self._creating:
            task = self.machines.get(machine_id)
            if task is not None and task.record.generation < generation:
                await task.keeper.fence(generation, outcome)
            else:
                at_ms = int(self.context.clock.now().timestamp() * 1000)
                await self.context.journal.commit(Change(fence=(machine_id, generation), outcome=outcome, at_ms=at_ms))
            self._fences[machine_id] = max(generation, self._fences.get(machine_id, 0))
        log.info("machine fenced", machine=machine_id, below_generation=generation, had_one=task is not None)

    async def fence_all(self) -> None:
        """This host belongs to the cluster no more, for ever: all its machines end, and it takes no others."""
        await self.fence(self._void_mark, 1)
        for task in list(self.machines.values()):
            await self.fence(task.record.id, task.record.generation + 1)

    @property
    def is_void(self) -> bool:
        return self._void_mark in self._fences

    @property
    def _void_mark(self) -> str:
        """By the node's id: a host that joins anew gets another."""
        return f"node/{self.context.node}"

    def _floor(self, machine_id: str) -> int:
        return max(self._fences.get(machine_id, 0), self._newest(machine_id))

    def _check_generation(self, request: CreateMachine) -> None:
        if self.is_void:
            raise Conflict(f"{self.context.node} belongs to this cluster no more")
        if request.generation < (floor := self._floor(request.machine_id)):
            raise Conflict(f"{request.machine_id} was placed elsewhere since (generation {floor})")

    def _check_in_time(self, request: CreateMachine) -> None:
        """This process stood still, or the request was long on its way: the machine may be on another host by now."""
        late_ms = unix_ms(self.context.clock.now()) - request.expires_at_ms
        if request.expires_at_ms and late_ms > 0:
            raise NodeUnreachable(f"{self.context.node} got to the request {late_ms / 1000:.1f} s too late")

    async def publish(self, machine_id: str, generation: int, outcome: Outcome) -> None:
        """Show a machine that was created hidden."""
        task = self.get(machine_id)

        def check(record: MachineRecord) -> None:
            if record.generation != generation or record.desired.ends:
                raise Conflict(f"generation {generation} of {machine_id} is not here (any more)")

        def kept(met: MachineRecord, shown: MachineRecord) -> Outcome:
            del met, shown
            return outcome

        await task.keeper.alter(lambda record: msgspec.structs.replace(record, hidden=False), guard=check, outcome=kept)
        self._service_keys |= {row.key for row in task.keeper.rows() if row.key.startswith("svc/")}

    async def hold(self, machine_id: str, seconds: float, reason: str) -> MachineRecord:
        """The machine is not put to sleep before then; 0 seconds: it may be again. Journaled when it returns."""
        hold = holds.made(seconds, reason, int(self.context.clock.now().timestamp() * 1000))
        return await self.get(machine_id).keeper.alter(lambda record: msgspec.structs.replace(record, hold=hold))

    # -- room ----------------------------------------------------------------------------------------------------------

    def used(self, *, without: str = "") -> tuple[float, int]:
        """CPUs and MiB that started machines, those about to start and suspended ones are promised."""
        if self._used[0] != self.revision:
            self._used = (
                self.revision,
                {task.record.id: guests.resolve(task.record.version.config) for task in self._holding()},
            )
        sizes = [size for machine_id, size in self._used[1].items() if machine_id != without]
        return sum(size.cpu_share for size in sizes), sum(size.memory_mb for size in sizes)

    def _holding(self) -> Iterator[MachineTask]:
        for task in self.machines.values():
            if task.record.state in _HOLDS_ROOM or task.record.desired.goal == "started":
                yield task

    def check_isolation(self, size: guests.Size) -> None:
        """A machine is never kept apart by less than it asks for."""
        offered = self.context.driver.isolation
        if not guests.isolates(offered, size.isolation):
            raise CapacityError(
                f"config.guest.isolation: {size.isolation} is asked for, this host has {offered}",
                excluded={"weaker": 1},
            )

    def check_room(self, size: guests.Size, *, without: str = "") -> None:
        self.check_isolation(size)
        cpus, memory_mib = self.used(without=without)
        free_mib = self.capacity.memory_mib - memory_mib
        if size.memory_mb > free_mib:
            raise CapacityError(
                f"could not reserve resource for machine: {size.memory_mb} MiB of memory needed, "
                f"{max(free_mib, 0)} MiB free on this host",
                excluded={"memory": 1},
            )
        free_cpus = self.capacity.cpus - cpus
        if size.cpu_share > free_cpus:
            raise CapacityError(
                f"could not reserve resource for machine: {size.cpu_share:g} CPUs needed, "
                f"{max(free_cpus, 0):g} free on this host",
                excluded={"cpus": 1},
            )
