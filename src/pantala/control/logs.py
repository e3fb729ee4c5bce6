"""Log lines of an app, merged from the nodes that hold its machines and from all edges: what a proxy says of a client
is in the log of the host that the client reached.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import anyio
import msgspec
import structlog

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import InvalidRequest, PantalaError
from pantala.store import hosts, machines
from pantala.store.records import AppRecord
from pantala.wire.api import LogLine, LogsResponse
from pantala.wire.node import ReadLogs

log = structlog.get_logger()

LIMIT_MAX = 1000
READ_TIMEOUT_S = 5.0
FOLLOW_EVERY_S = 0.25
EDGES_EVERY = 8
"""Edges are many and say little: they are asked at every so many turns."""
NODES_ASKED_AT_ONCE_MAX = 32
RECENT_PLACEMENTS_MAX = 1000


class LogsChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines: of one machine or all, of one region or all, after a moment, at most so many at first."""

    machine_id: str | None = None
    region: str | None = None
    since_ns: int = 0
    limit: int = 100


class Logs:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def read(self, principal: Principal, app_name: str, chosen: LogsChoice) -> LogsResponse:
        """The newest lines after `since_ns`; an empty answer gives the same token back."""
        app = await self._access.app(principal, app_name, Action.READ)
        _check(chosen)
        nodes = await self._nodes_of(app, chosen.machine_id) | await self._edges(chosen.machine_id)
        cursors = dict.fromkeys(nodes, chosen.since_ns)
        lines = await self._read(app, cursors, chosen)
        newest = max((nanoseconds(line.timestamp) for line in lines), default=chosen.since_ns)
        return LogsResponse(lines=lines[-chosen.limit :], next_token=str(newest))

    async def follow(self, principal: Principal, app_name: str, chosen: LogsChoice) -> AsyncIterator[LogLine]:
        """The newest lines, then each new one, until the caller stops. Each node has a cursor of its own, so a line
        that one of them says late is not passed over."""
        app = await self._access.app(principal, app_name, Action.READ)
        _check(chosen)
        return self._follow(app, chosen)

    async def _follow(self, app: AppRecord, chosen: LogsChoice) -> AsyncIterator[LogLine]:
        cursors: dict[str, int] = {}
        for turn in itertools.count():
            asked = await self._nodes_of(app, chosen.machine_id)
            if turn % EDGES_EVERY == 0:
                asked |= await self._edges(chosen.machine_id)
            some = {node: cursors.get(node, chosen.since_ns) for node in asked}
            for line in await self._read(app, some, chosen):
                yield line
            cursors |= some
            chosen = msgspec.structs.replace(chosen, limit=LIMIT_MAX)
            await self._context.clock.sleep(FOLLOW_EVERY_S)

    async def _nodes_of(self, app: AppRecord, machine_id: str | None) -> set[str]:
        placements = await self._context.db.read(lambda c: machines.list_placements(c, app.id, include_deleted=True))
        return {
            placement.node
            for placement in placements[-RECENT_PLACEMENTS_MAX:]
            if machine_id is None or placement.machine_id == machine_id
        }

    async def _edges(self, machine_id: str | None) -> set[str]:
        if machine_id is not None:
            return set()
        return {node.id for node in await self._context.db.read(hosts.list_nodes) if node.edge}

    async def _read(self, app: AppRecord, cursors: dict[str, int], chosen: LogsChoice) -> list[LogLine]:
        """Lines of all nodes by time; moves the cursors. A node that does not answer is passed over."""
        limiter = anyio.CapacityLimiter(NODES_ASKED_AT_ONCE_MAX)
        found: list[tuple[int, LogLine]] = []

        async def ask(node: str, since_ns: int) -> None:
            call = ReadLogs(app=app.name, machine_id=chosen.machine_id, since_ns=since_ns, limit=chosen.limit)
            async with limiter:
                try:
                    lines: list[LogLine] = await self._context.nodes.call(node, call, timeout_s=READ_TIMEOUT_S)
                except PantalaError as error:
                    log.warning("logs not read", node=node, app=app.name, error=error.message)
                    return
            dated = [(nanoseconds(line.timestamp), line) for line in lines]
            cursors[node] = max((at for at, _ in dated), default=since_ns)
            found.extend(dated)

        async with anyio.create_task_group() as tasks:
            for node, since_ns in list(cursors.items()):
                tasks.start_soon(ask, node, since_ns)
        found.sort(key=lambda dated: dated[0])
        return [line for _, line in found if chosen.region in (None, line.region)]


def nanoseconds(timestamp: str) -> int:
    """Since the epoch, of RFC 3339 in UTC with up to nine decimals."""
    whole, _, fraction = timestamp.removesuffix("Z").partition(".")
    at = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return int(at.timestamp()) * 1_000_000_000 + int((fraction or "0").ljust(9, "0")[:9])


def _check(chosen: LogsChoice) -> None:
    if not 1 <= chosen.limit <= LIMIT_MAX:
        raise InvalidRequest(f"must be 1 to {LIMIT_MAX}", field="limit")
