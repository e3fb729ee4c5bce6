"""The escape suite of a host, asked for and looked at by the operator; the host's agent runs and keeps it."""

from __future__ import annotations

from pantala.auth.grants import Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import Conflict, NotFound
from pantala.store import hosts
from pantala.wire.escape import EscapeReport
from pantala.wire.node import GetEscapeSuite, RunEscapeSuite

RUN_WITHIN_S = 60.0


class EscapeSuites:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def run(self, principal: Principal, host: str) -> EscapeReport:
        """Makes a machine there for some seconds. Raises NodeUnreachable, Conflict while one runs."""
        await self._find(principal, host)
        report: EscapeReport = await self._context.nodes.call(host, RunEscapeSuite(), timeout_s=RUN_WITHIN_S)
        suite = report.suite
        detail = {"through": suite.through, "unclear": suite.unclear} if suite is not None else {}
        await self._context.db.write(
            lambda c: self._context.audit(
                c, actor=principal.email, org_id=None, action="host.escape_suite", target=host, detail=detail
            )
        )
        return report

    async def last(self, principal: Principal, host: str) -> EscapeReport:
        await self._find(principal, host)
        return await self._context.nodes.call(host, GetEscapeSuite())

    async def _find(self, principal: Principal, host: str) -> None:
        await self._access.operator(principal)
        node = await self._context.db.read(lambda c: hosts.find_node(c, host))
        if node is None:
            raise NotFound(f"there is no host {host}", hint="`pantala host list` shows them")
        if node.status not in hosts.MEMBERS:
            raise Conflict(f"{host} is {node.status}", hint="a host that left runs no machines any more")
