"""What control knows of nodes: which there are (table nodes), what they have free (asked, and kept for a moment)."""

from __future__ import annotations

from collections.abc import Iterable

import anyio
import structlog
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.errors import InternalError, PantalaError
from pantala.planner.placement import Candidate, Fleet
from pantala.store import hosts, machines
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

    async def fleet(self) -> Fleet:
        """Every node with what it has free now; those that do not answer are in it as such."""

        def load(connection: Connection) -> tuple[list[NodeRecord], dict[str, set[int]]]:
            return hosts.list_nodes(connection), machines.orgs_by_node(connection)

        nodes, orgs = await self._context.db.read(load)
        infos = await self.infos([node.id for node in nodes])
        return Fleet(_candidate(node, infos[node.id], orgs) for node in nodes)

    async def sealing_key(self, node_id: str) -> str:
        """The key that this node joined with, and opens secrets with."""
        node = await self._context.db.read(lambda c: hosts.find_node(c, node_id))
        if node is None:
            raise InternalError(f"the node {node_id} is not known")
        return node.sealing_key

    async def regions(self) -> tuple[list[str], str]:
        """Configured ones and those that hosts joined in, and the default one: the configured default, or where the
        first host is as long as the default has none."""
        nodes = await self._context.db.read(hosts.list_nodes)
        settings = self._context.settings
        codes = sorted({*settings.regions, *(node.region for node in nodes)})
        default = settings.default_region
        if nodes and all(node.region != default for node in nodes):
            default = min(nodes, key=lambda node: (node.created_at_ms, node.id)).region
        return codes, default

    async def capacity_by_region(self) -> dict[str, int]:
        """Regions that have nodes, with how many of the smallest machines (256 MiB) would fit now."""
        nodes = await self._context.db.read(hosts.list_nodes)
        infos = await self.infos([node.id for node in nodes])
        found: dict[str, int] = {}
        for node in nodes:
            info = infos[node.id]
            found[node.region] = found.get(node.region, 0) + (info.memory_mib_free // 256 if info else 0)
        return found

    async def infos(self, node_ids: Iterable[str]) -> dict[str, NodeInfo | None]:
        """What each of these nodes says of itself, at most `FRESH_S` old; None for one that does not answer."""
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
