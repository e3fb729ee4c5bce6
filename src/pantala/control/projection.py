"""Reads of machines: asked of their owners, laid over what this server has acknowledged.

A machine whose owner does not answer is shown as last known, with `host_status: unreachable` and its config under
`incomplete_config`.
"""

from __future__ import annotations

import anyio
import structlog

from pantala.auth.grants import Action, Principal
from pantala.control import documents
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.documents import Document
from pantala.control.machines import Machines
from pantala.errors import NodeUnreachable, NotFound, PantalaError
from pantala.store import machines as statements
from pantala.store.records import AppRecord, PlacementRecord
from pantala.wire.machine import Machine
from pantala.wire.node import GetMachine, ListMachines

log = structlog.get_logger()

READ_TIMEOUT_S = 5.0
NODES_ASKED_AT_ONCE_MAX = 64
SEEN_MAX = 20_000


class Projection:
    def __init__(self, context: Context, access: Access, machines: Machines) -> None:
        self._context = context
        self._access = access
        self._machines = machines
        self._seen: dict[str, Machine] = {}

    async def get(self, principal: Principal, app_name: str, machine_id: str, *, with_lease: bool = False) -> Document:
        """Also of a destroyed machine (flyctl reads its last events)."""
        app = await self._access.app(principal, app_name, Action.READ)
        placement = await self._machines.placement(app, machine_id)
        return documents.answer(await self.machine(placement), placement, with_lease=with_lease)

    async def machine(self, placement: PlacementRecord) -> Machine:
        try:
            machine: Machine = await self._context.nodes.call(
                placement.node, GetMachine(machine_id=placement.machine_id), timeout_s=READ_TIMEOUT_S
            )
        except NodeUnreachable:
            return self._last_known(placement)
        except NotFound:
            return self._absent(placement)
        await self._saw(placement, machine)
        return machine

    async def list_machines(
        self,
        principal: Principal,
        app_name: str,
        *,
        regions: frozenset[str],
        states: frozenset[str],
        metadata: dict[str, str],
        include_deleted: bool,
        with_leases: bool = False,
        summary: bool = False,
    ) -> list[Document]:
        app = await self._access.app(principal, app_name, Action.READ)
        found = await self.machines_of(app, include_deleted=include_deleted)
        return [
            documents.answer(machine, placement, with_lease=with_leases, summary=summary)
            for placement, machine in found
            if (not regions or machine.region in regions)
            and (not states or machine.state in states)
            and _has_metadata(machine, metadata)
        ]

    async def machines_of(self, app: AppRecord, *, include_deleted: bool) -> list[tuple[PlacementRecord, Machine]]:
        """Oldest first."""
        placements = await self._context.db.read(
            lambda c: statements.list_placements(c, app.id, include_deleted=include_deleted)
        )
        answers = await self._ask(app.name, {placement.node for placement in placements})
        found: list[tuple[PlacementRecord, Machine]] = []
        for placement in placements:
            on_node = answers[placement.node]
            if on_node is None:
                machine = self._last_known(placement)
            elif placement.machine_id in on_node:
                machine = on_node[placement.machine_id]
                await self._saw(placement, machine)
            else:
                machine = self._absent(placement)
            if include_deleted or machine.state != "destroyed":
                found.append((placement, machine))
        return found

    async def _ask(self, app: str, nodes: set[str]) -> dict[str, dict[str, Machine] | None]:
        """Each node's machines of the app by id; None for a node that does not answer."""
        limiter = anyio.CapacityLimiter(NODES_ASKED_AT_ONCE_MAX)
        answers: dict[str, dict[str, Machine] | None] = {}
        # Destroyed machines are asked for in any case: one that destroyed itself must not look lost.
        call = ListMachines(app=app, include_deleted=True)

        async def ask(node: str) -> None:
            async with limiter:
                try:
                    found: list[Machine] = await self._context.nodes.call(node, call, timeout_s=READ_TIMEOUT_S)
                    answers[node] = {machine.id: machine for machine in found}
                except PantalaError as error:
                    log.warning("machines not listed", node=node, app=app, error=error.message)
                    answers[node] = None

        async with anyio.create_task_group() as tasks:
            for node in nodes:
                tasks.start_soon(ask, node)
        return answers

    async def _saw(self, placement: PlacementRecord, machine: Machine) -> None:
        if machine.state == "destroyed":
            self._seen.pop(machine.id, None)
            if not placement.tombstone:
                await self._machines.bury(machine.id)
            return
        if len(self._seen) >= SEEN_MAX:
            self._seen.pop(next(iter(self._seen)))
        self._seen[machine.id] = machine

    def _last_known(self, placement: PlacementRecord) -> Machine:
        machine = self._seen.get(placement.machine_id) or documents.snapshot_of(placement)
        return documents.unreachable(machine, state="destroying" if placement.tombstone else None)

    def _absent(self, placement: PlacementRecord) -> Machine:
        """Its owner answers and does not know it: forgotten after its destruction, or lost with the owner's disk."""
        machine = documents.snapshot_of(placement)
        if placement.tombstone:
            return documents.unreachable(machine, host_status="ok", state="destroyed")
        return documents.unreachable(machine, host_status="unknown")


def _has_metadata(machine: Machine, wanted: dict[str, str]) -> bool:
    config = machine.config or machine.incomplete_config
    metadata = (config.metadata if config else None) or {}
    return all(metadata.get(key) == value for key, value in wanted.items())
