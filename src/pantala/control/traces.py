"""What the proxies know of one request, collected from their hosts: first from the edge that its id names, then from
the hosts of the machines that this edge tried; from all others only when no edge is found.

Whoever may read an app sees its requests. Others get the same answer as for an id that nobody made; what was about no
app (a name that nobody has) is for the operator.
"""

from __future__ import annotations

from collections.abc import Iterable

import anyio
import structlog

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import NotFound, PantalaError, TransientError, UserError
from pantala.kit import request_ids
from pantala.store import hosts
from pantala.store.records import NodeRecord
from pantala.wire.feed import TraceRecord
from pantala.wire.node import HostTrace, TraceRequest
from pantala.wire.trace import RequestTrace, TracePart, UnheardHost

log = structlog.get_logger()

CALL_WITHIN_S = 3.0
ALL_WITHIN_S = 10.0
NODES_ASKED_AT_ONCE_MAX = 32
CLOCKS_DIFFER_MS = 5_000
"""Between the host that made an id and the server that judges its age."""
KEPT_MIN = 10


class Traces:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def get(self, principal: Principal, text: str) -> RequestTrace:
        ulid, region = request_ids.parse(text)
        nodes = {node.id: node for node in await self._context.db.read(hosts.list_nodes)}
        asked = _Asked(self._context, ulid)
        with anyio.move_on_after(ALL_WITHIN_S):
            await asked.ask(node.id for node in nodes.values() if node.region == region)
            if not asked.edges():
                await asked.ask(nodes)
            await asked.ask(node for node in asked.workers() if node in nodes)
        if not asked.answers and asked.unheard:
            raise TransientError("no host answers at present", hint="look at pantala host list")
        parts = await self._readable(principal, asked, nodes)
        if not parts:
            raise self._nothing(ulid, asked)
        unheard = [UnheardHost(host=host, reason=reason) for host, reason in sorted(asked.unheard.items())]
        return RequestTrace(id=text.strip(), parts=parts, unheard=unheard)

    async def _readable(self, principal: Principal, asked: _Asked, nodes: dict[str, NodeRecord]) -> list[TracePart]:
        found = [(host, answer.records) for host, answer in asked.answers.items() if answer.records]
        apps = {record.app for _, records in found for record in records}
        allowed = {app for app in apps if await self._may_read(principal, app)}
        parts = [
            TracePart(host=host, region=nodes[host].region, records=kept)
            for host, records in found
            if (kept := [record for record in records if record.app in allowed])
        ]
        return sorted(parts, key=lambda part: (part.records[0].role != "edge", part.records[0].began_us))

    async def _may_read(self, principal: Principal, app: str) -> bool:
        try:
            if app:
                await self._access.app(principal, app, Action.READ)
            else:
                await self._access.operator(principal)
        except UserError:
            return False
        return True

    def _nothing(self, ulid: str, asked: _Asked) -> NotFound:
        """Says nothing of whether there is such a request: that would be news to somebody who may not read it."""
        made_at_ms = request_ids.made_at_ms(ulid)
        since_ms = max((answer.since_ms for answer in asked.answers.values()), default=0)
        unheard = f"; not heard: {', '.join(sorted(asked.unheard))}" if asked.unheard else ""
        if made_at_ms > self._context.now_ms() + CLOCKS_DIFFER_MS:
            return NotFound(f"no request has this id: it is of a time to come{unheard}")
        if made_at_ms < since_ms:
            age_s = (self._context.now_ms() - since_ms) // 1000
            return NotFound(
                f"what there was about this request is not kept any longer{unheard}",
                hint=f"records reach back {age_s} s now, {KEPT_MIN} minutes at most",
            )
        return NotFound(
            f"no request with this id is known{unheard}",
            hint="a request is known once an app has answered it or it has failed",
        )


class _Asked:
    """Hosts that were asked for one request, each once."""

    def __init__(self, context: Context, ulid: str) -> None:
        self._context = context
        self._request = TraceRequest(request=ulid)
        self.answers: dict[str, HostTrace] = {}
        self.unheard: dict[str, str] = {}

    async def ask(self, nodes: Iterable[str]) -> None:
        limiter = anyio.CapacityLimiter(NODES_ASKED_AT_ONCE_MAX)

        async def one(node: str) -> None:
            async with limiter:
                try:
                    self.answers[node] = await self._context.nodes.call(node, self._request, timeout_s=CALL_WITHIN_S)
                    del self.unheard[node]
                except PantalaError as error:
                    log.warning("request not looked up", node=node, request=self._request.request, error=error.message)
                    self.unheard[node] = error.message

        async with anyio.create_task_group() as tasks:
            for node in nodes:
                if node not in self.answers and node not in self.unheard:
                    self.unheard[node] = "it was not asked in time"
                    tasks.start_soon(one, node)

    def edges(self) -> list[TraceRecord]:
        return [record for record in self._records() if record.role == "edge"]

    def workers(self) -> list[str]:
        """Hosts whose machines an edge tried."""
        return sorted({record.node for record in self.edges() if record.node})

    def _records(self) -> list[TraceRecord]:
        return [record for answer in self.answers.values() for record in answer.records]
