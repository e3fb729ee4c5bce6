"""Machines move to other hosts: those of a host that is drained one by one, those of a host that is lost all at once.

A move is a row of the table moves; each cycle looks at all rows and takes the next step of each, so a process that dies
anywhere goes on with its next life. Every step may run twice:

    choose ──► prepare ──► publish ──► fence ──► done        prepare ──► undo ──► done

*prepare*: the target makes a hidden copy of the next generation and brings it up, while the old copy serves under a
lease that keeps API callers away. Once it is ready SQL says that it counts. *publish*: the target shows it; its row, of
a newer generation, hides the old one's everywhere. *fence*: the old copy drains, stops, and never runs again there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import anyio
import msgspec
import structlog
from sqlalchemy import Connection

from pantala.control import documents
from pantala.control.context import Context
from pantala.control.images import Images
from pantala.control.nodes import Nodes
from pantala.control.secrets import Secrets
from pantala.domain import guests
from pantala.errors import LeaseHeld, NodeUnreachable, NotFound, PantalaError, TransientError
from pantala.planner.placement import Ask
from pantala.store import apps, hosts, machines, moves
from pantala.store.records import AppRecord, MoveRecord, NodeRecord, PlacementRecord
from pantala.wire.api import Lease
from pantala.wire.machine import Machine, MachineConfig
from pantala.wire.node import (
    AcquireLease,
    AppRef,
    CreateMachine,
    FenceMachine,
    GetMachine,
    NodeRequest,
    PublishMachine,
    ReleaseLease,
)

log = structlog.get_logger()

EVERY_S = 1.0
IDLE_S = 5.0
AT_ONCE_MAX = 8
CALL_TIMEOUT_S = 10.0
READY_WITHIN_S = 540.0
REFUSED_S = 60.0
LEASE_TTL_S = 600
OWNER = "pantala (moving the machine)"
VOLUMES = "it has a volume on this host"
_ENDED = ("failed", "launch_failed", "destroyed", "migrated")
_STILL = ("started", "stopped", "suspended", "created", "failed", "launch_failed")


class _Refused(NamedTuple):
    nodes: frozenset[str]
    until: float


class Moves:
    def __init__(self, context: Context, nodes: Nodes, images: Images, secrets: Secrets) -> None:
        self._context = context
        self._nodes = nodes
        self._images = images
        self._secrets = secrets
        self._nudged = anyio.Event()
        self._refused: dict[str, _Refused] = {}
        self._asked: set[str] = set()
        self.reasons: dict[str, str] = {}
        """By machine, why it is not on its way although it should be."""

    async def run(self) -> None:
        while True:
            self._nudged = anyio.Event()
            pause_s = EVERY_S
            try:
                pause_s = EVERY_S if await self.cycle() else IDLE_S
            except PantalaError:
                log.exception("moves not carried on")
            with anyio.move_on_after(pause_s):
                await self._nudged.wait()

    def nudge(self) -> None:
        self._nudged.set()

    async def cycle(self) -> bool:
        """One step of everything that is on its way; whether anything is."""
        nodes = {node.id: node for node in await self._context.db.read(hosts.list_nodes)}
        under_way = await self._context.db.read(moves.list_moves)
        for node in nodes.values():
            if node.status == "draining":
                await self._begin_next(node, under_way)
        under_way = await self._context.db.read(moves.list_moves)
        limiter = anyio.CapacityLimiter(AT_ONCE_MAX)

        async def advance(move: MoveRecord) -> None:
            async with limiter:
                try:
                    await self._advance(move, nodes)
                except PantalaError as error:
                    self.reasons[move.machine_id] = error.message
                    log.info("move waits", machine=move.machine_id, phase=move.phase, why=error.message)

        for launch in (True, False):  # whoever serves gets room first
            async with anyio.create_task_group() as tasks:
                for move in under_way:
                    if move.launch == launch:
                        tasks.start_soon(advance, move)
        return bool(under_way) or any(node.status == "draining" for node in nodes.values())

    # -- beginning -----------------------------------------------------------------------------------------------------

    async def _begin_next(self, node: NodeRecord, under_way: list[MoveRecord]) -> None:
        """The next machine of a host that is drained, unless one is on its way. What cannot leave says why."""
        if any(move.source == node.id and move.phase in moves.UNDECIDED for move in under_way):
            return
        for placement in await self._context.db.read(lambda c: moves.list_placed_on(c, node.id)):
            if placement.phase != "placed":
                continue
            if moves.has_volumes(placement):
                self.reasons[placement.machine_id] = VOLUMES
                continue
            try:
                seen: Machine = await self._call(node.id, GetMachine(machine_id=placement.machine_id))
                if seen.state not in _STILL:
                    self.reasons[placement.machine_id] = f"it is {seen.state}"
                    continue
                target = await self._choose(placement)
            except NodeUnreachable as error:
                self.reasons[placement.machine_id] = error.message
                return
            except PantalaError as error:
                self.reasons[placement.machine_id] = error.message
                continue
            if await self._begin(placement, target=target, launch=seen.state == "started"):
                return

    async def _begin(self, placement: PlacementRecord, *, target: str, launch: bool) -> bool:
        now_ms = self._context.now_ms()
        generation = await self._context.db.write(
            lambda c: moves.begin(
                c, placement.machine_id, source=placement.node, target=target, launch=launch, now_ms=now_ms
            )
        )
        if generation is not None:
            log.info("machine begins to move", machine=placement.machine_id, source=placement.node, target=target)
        return generation is not None

    async def _choose(self, placement: PlacementRecord) -> str:
        """Another host in its region, else in the app's other regions. Raises CapacityError."""
        ask = await self._ask(placement)
        refused = self._refused.get(placement.machine_id)
        if refused is not None and refused.until > self._context.clock.monotonic():
            ask = msgspec.structs.replace(ask, refused=ask.refused | refused.nodes)
        return (await self._nodes.fleet()).choose(ask).id

    async def _ask(self, placement: PlacementRecord) -> Ask:
        def load(connection: Connection) -> tuple[AppRecord, dict[str, int], list[PlacementRecord]]:
            app_id = placement.app_id
            everyone = machines.list_placements(connection, app_id)
            return apps.get_app_by_id(connection, app_id), machines.count_by_node(connection, app_id), everyone

        app, present, everyone = await self._context.db.read(load)
        size = guests.resolve(_config(documents.snapshot_of(placement)))
        return Ask(
            org=app.org_id,
            regions=[frozenset({placement.region}), frozenset(other.region for other in everyone)],
            cpus=size.cpus,
            shared_cpu=size.cpu_kind == "shared",
            memory_mib=size.memory_mb,
            shared_kernel=self._context.settings.shared_kernel,
            isolation=size.isolation,
            present={node: count - (node == placement.node) for node, count in present.items()},
            refused=frozenset({placement.node}),
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    async def _advance(self, move: MoveRecord, nodes: dict[str, NodeRecord]) -> None:
        placement = await self._context.db.read(lambda c: moves.get_placement(c, move.machine_id))
        match move.phase:
            case "choose":
                await self._aim(move, placement)
            case "prepare" if placement.tombstone or placement.generation != move.generation:
                await self._step(move, "undo")
            case "prepare":
                await self._prepare(move, placement, nodes)
            case "publish":
                await self._publish(move, placement, nodes)
            case "fence":
                await self._fence(move, nodes)
            case _:
                await self._undo(move, nodes)

    async def _aim(self, move: MoveRecord, placement: PlacementRecord) -> None:
        """A machine whose host is gone looks for a place, for as long as it takes."""
        if placement.tombstone or placement.generation != move.generation:
            await self._end(move)
            return
        target = await self._choose(placement)
        now_ms = self._context.now_ms()
        await self._context.db.write(lambda c: moves.aim(c, move, target=target, now_ms=now_ms))
        self._nudged.set()

    async def _prepare(self, move: MoveRecord, placement: PlacementRecord, nodes: dict[str, NodeRecord]) -> None:
        source, target = nodes.get(move.source), nodes.get(_target(move))
        late = self._context.now_ms() - move.updated_at_ms > READY_WITHIN_S * 1000
        if target is None or late:
            await self._give_up(move, f"its copy on {move.target} was not ready in time")
            return
        try:
            machine = await self._old_copy(move) if source is not None else documents.snapshot_of(placement)
        except TransientError:
            raise  # the source is asked again, until it is late
        except PantalaError as error:
            await self._give_up(move, error.message, targets_fault=False)
            return
        try:
            made = await self._new_copy(move, placement, machine, target, hidden=source is not None)
        except PantalaError as error:
            await self._give_up(move, error.message)
            return
        if source is None or _is_ready(made, launch=move.launch):
            await self._switch(move, made, target)
        elif made.state in _ENDED or (move.launch and made.state == "stopped"):
            await self._give_up(move, f"its copy on {move.target} is {made.state}")

    async def _old_copy(self, move: MoveRecord) -> Machine:
        """Held by a lease, so that nobody changes what is being copied; wakes and restarts go on."""
        await self._lease(move)
        return await self._call(move.source, GetMachine(machine_id=move.machine_id))

    async def _lease(self, move: MoveRecord) -> Lease:
        call = AcquireLease(request_id=_id(move, "lease"), machine_id=move.machine_id, ttl_s=LEASE_TTL_S, owner=OWNER)
        return await self._call(move.source, call)

    async def _new_copy(
        self, move: MoveRecord, placement: PlacementRecord, machine: Machine, target: NodeRecord, *, hidden: bool
    ) -> Machine:
        """Asked for again and again with one request id: made once, and never that of another generation."""
        app = await self._context.db.read(lambda c: apps.get_app_by_id(c, placement.app_id))
        given = await self._secrets.sealed_for(app.id, target.id)
        call = CreateMachine(
            request_id=_id(move, "create"),
            machine_id=move.machine_id,
            generation=move.generation,
            app=AppRef(id=str(app.id), name=app.name, org=app.org_slug, network=app.network_id),
            name=placement.name,
            region=target.region,
            config=_config(machine),
            image=machine.image_ref,
            pull_token=self._images.pull_token(machine.image_ref),
            other_images=self._images.other_images(machine),
            secrets=given,
            skip_launch=not move.launch,
            cordoned=machine.cordoned,
            hidden=hidden,
        )
        if call.request_id in self._asked:  # its room is counted already
            await self._call(target.id, call)
        else:
            self._asked.add(call.request_id)
            with self._nodes.sent(target.id, await self._ask(placement)):
                await self._call(target.id, call)
        await self._secrets.record_delivery(app.id, target.id, given)
        found: Machine = await self._call(target.id, GetMachine(machine_id=move.machine_id))
        return found

    async def _switch(self, move: MoveRecord, made: Machine, target: NodeRecord) -> None:
        now_ms = self._context.now_ms()
        snapshot = msgspec.json.encode(msgspec.structs.replace(made, nonce=None)).decode()
        switched = await self._context.db.write(
            lambda c: moves.switch(c, move, region=target.region, snapshot=snapshot, now_ms=now_ms)
        )
        if not switched:
            await self._step(move, "undo")
        self.reasons.pop(move.machine_id, None)
        self._nudged.set()

    async def _publish(self, move: MoveRecord, placement: PlacementRecord, nodes: dict[str, NodeRecord]) -> None:
        call = PublishMachine(request_id=_id(move, "publish"), machine_id=move.machine_id, generation=move.generation)
        if not placement.tombstone and _target(move) in nodes:
            try:
                await self._call(_target(move), call)
            except NotFound:
                log.warning("machine is gone from where it moved to", machine=move.machine_id, node=move.target)
        await self._step(move, "fence")

    async def _fence(self, move: MoveRecord, nodes: dict[str, NodeRecord]) -> None:
        if move.source in nodes:
            call = FenceMachine(request_id=_id(move, "fence"), machine_id=move.machine_id, generation=move.generation)
            await self._call(move.source, call)
        await self._end(move)
        log.info("machine moved", machine=move.machine_id, source=move.source, target=move.target)

    # -- when it does not work out -------------------------------------------------------------------------------------

    async def _give_up(self, move: MoveRecord, why: str, *, targets_fault: bool = True) -> None:
        log.warning("machine was not moved", machine=move.machine_id, target=move.target, why=why)
        self.reasons[move.machine_id] = why
        if targets_fault:
            before = self._refused.get(move.machine_id)
            known = before.nodes if before is not None else frozenset[str]()
            until = self._context.clock.monotonic() + REFUSED_S
            self._refused[move.machine_id] = _Refused(known | {_target(move)}, until)
        await self._step(move, "undo")

    async def _undo(self, move: MoveRecord, nodes: dict[str, NodeRecord]) -> None:
        """The copy on the target goes; a machine whose host is gone looks for another place."""
        if move.source in nodes:
            await self._release(move)
        if move.target in nodes:
            call = FenceMachine(
                request_id=_id(move, "undo"), machine_id=move.machine_id, generation=move.generation + 1
            )
            await self._call(_target(move), call)
        homeless = move.source not in nodes
        now_ms = self._context.now_ms()

        def end(connection: Connection) -> None:
            moves.end(connection, move)
            if homeless and moves.get_placement(connection, move.machine_id).generation == move.generation:
                moves.begin(
                    connection, move.machine_id, source=move.source, target=None, launch=move.launch, now_ms=now_ms
                )

        await self._context.db.write(end)

    async def _release(self, move: MoveRecord) -> None:
        try:
            lease = await self._lease(move)
            call = ReleaseLease(request_id=_id(move, "release"), machine_id=move.machine_id, nonce=lease.nonce)
            await self._call(move.source, call)
        except (NotFound, LeaseHeld):
            pass  # it was never ours, or the machine is gone
        except TransientError:
            log.info("lease of a move is left to expire", machine=move.machine_id)

    # -- footnotes -----------------------------------------------------------------------------------------------------

    async def _step(self, move: MoveRecord, after: str) -> None:
        now_ms = self._context.now_ms()
        await self._context.db.write(lambda c: moves.step(c, move, before=move.phase, after=after, now_ms=now_ms))
        self._nudged.set()

    async def _end(self, move: MoveRecord) -> None:
        await self._context.db.write(lambda c: moves.end(c, move))
        self._asked.discard(_id(move, "create"))
        self.reasons.pop(move.machine_id, None)
        self._refused.pop(move.machine_id, None)

    async def _call(self, node: str, call: NodeRequest) -> Any:
        return await self._context.nodes.call(node, call, timeout_s=CALL_TIMEOUT_S)


def _id(move: MoveRecord, what: str) -> str:
    """The same for every repetition, so that a step that was done is answered and not done again."""
    return f"move-{move.machine_id}-{move.generation}-{what}"


def _target(move: MoveRecord) -> str:
    assert move.target is not None, "only a move that looks for a place has none"
    return move.target


def _config(machine: Machine) -> MachineConfig:
    config = machine.config or machine.incomplete_config
    assert config is not None
    return config


def _is_ready(machine: Machine, *, launch: bool) -> bool:
    """As good as the one that it replaces: started, its ports accept, its checks pass."""
    if not launch:
        return machine.state == "stopped"
    if machine.state != "started" or any(check.status != "passing" for check in machine.checks):
        return False
    ready = any(event.type == "ready" for event in machine.events)
    return ready or not _config(machine).services
