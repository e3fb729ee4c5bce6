"""What control knows of nodes: which there are (table nodes), what they have free (asked, and kept for a moment)."""

from __future__ import annotations

from collections.abc import Iterable

import anyio
import structlog
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.errors import InternalError, NodeUnreachable, PantalaError
from pantala.planner.placement import Candidate, Fleet
from pantala.store import machines
from pantala.store.records import NodeRecord
from pantala.wire.node import GetNode, NodeInfo

log = structlog.get_logger()

FRESH_S = 2.0
ASK_TIMEOUT_S = 3.0
ASKED_AT_ONCE_MAX = 64


class Nodes:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._seen: dict[str, tuple[float, NodeInfo | None]] = {}

    async def ensure(self, node_id: str, *, region: str, zone: str, sealing_key: str) -> None:
        now_ms = self._context.now_ms()
        await self._context.db.write(
            lambda c: machines.ensure_node(
                c, node_id=node_id, region=region, zone=zone, sealing_key=sealing_key, now_ms=now_ms
            )
        )

    async def fleet(self) -> Fleet:
        """Every node with what it has free now; those that do not answer are in it as such."""

        def load(connection: Connection) -> tuple[list[NodeRecord], dict[str, set[int]]]:
            return machines.list_nodes(connection), machines.orgs_by_node(connection)

        nodes, orgs = await self._context.db.read(load)
        infos = await self._infos([node.id for node in nodes])
        return Fleet(_candidate(node, infos[node.id], orgs) for node in nodes)

    async def sealing_key(self, node_id: str) -> str:
        """The key that this node opens secrets with. The first one learned is kept; another one is not believed."""
        node = await self._context.db.read(lambda c: machines.find_node(c, node_id))
        if node is None:
            raise InternalError(f"the node {node_id} is not known")
        if node.sealing_key:
            return node.sealing_key
        info = (await self._infos([node_id]))[node_id]
        if info is None:
            raise NodeUnreachable(f"the host {node_id} does not answer")
        if not await self._context.db.write(lambda c: machines.pin_sealing_key(c, node_id, info.sealing_key)):
            raise InternalError(f"the node {node_id} shows another sealing key than the one it first had")
        return info.sealing_key

    async def capacity_by_region(self) -> dict[str, int]:
        """Regions that have nodes, with how many of the smallest machines (256 MiB) would fit now."""
        nodes = await self._context.db.read(machines.list_nodes)
        infos = await self._infos([node.id for node in nodes])
        found: dict[str, int] = {}
        for node in nodes:
            info = infos[node.id]
            found[node.region] = found.get(node.region, 0) + (info.memory_mib_free // 256 if info else 0)
        return found

    async def _infos(self, node_ids: Iterable[str]) -> dict[str, NodeInfo | None]:
        now = self._context.clock.monotonic()
        limiter = anyio.CapacityLimiter(ASKED_AT_ONCE_MAX)
        found: dict[str, NodeInfo | None] = {}

        async def ask(node_id: str) -> None:
            async with limiter:
                try:
                    info: NodeInfo | None = await self._context.nodes.call(node_id, GetNode(), timeout_s=ASK_TIMEOUT_S)
                except PantalaError as error:
                    log.warning("node does not answer", node=node_id, error=error.message)
                    info = None
            self._seen[node_id] = (self._context.clock.monotonic(), info)
            found[node_id] = info

        async with anyio.create_task_group() as tasks:
            for node_id in node_ids:
                at, info = self._seen.get(node_id, (0.0, None))
                if info is not None and now - at < FRESH_S:
                    found[node_id] = info
                else:
                    tasks.start_soon(ask, node_id)
        return found


def _candidate(node: NodeRecord, info: NodeInfo | None, orgs: dict[str, set[int]]) -> Candidate:
    return Candidate(
        id=node.id,
        region=node.region,
        zone=node.zone,
        reachable=info is not None,
        draining=node.status == "draining",
        isolation=info.isolation if info else "",
        cpus_free=info.cpus_free if info else 0.0,
        memory_mib=info.memory_mib if info else 0,
        memory_mib_free=info.memory_mib_free if info else 0,
        disk_mib_free=info.disk_mib_free if info else 0,
        orgs=frozenset(orgs.get(node.id, ())),
    )
