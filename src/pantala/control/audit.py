"""The audit log as it is read. It is written where things happen, in the transaction that does them (`Context.audit`).

Members of an org see what happened in it, everybody what he did himself, operators all.
"""

from __future__ import annotations

from typing import NamedTuple

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import Forbidden, InvalidRequest, NotFound, UserError
from pantala.kit.clock import rfc3339_ms
from pantala.store import accounts, ledger
from pantala.store.records import AuditRecord
from pantala.wire.audit import AuditEntry, AuditPage

LIMIT_MAX = 1000
NEEDED = "the audit log is for members of an org and for operators"


class AuditChoice(NamedTuple):
    """`since_s`: how long ago at most; 0: all that is kept. `cursor`: as an earlier page gave it."""

    app: str
    org: str
    since_s: float
    limit: int
    cursor: str


class Audit:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def page(self, principal: Principal, choice: AuditChoice) -> AuditPage:
        if not 1 <= choice.limit <= LIMIT_MAX:
            raise InvalidRequest(f"must be 1 to {LIMIT_MAX}", field="limit")
        if choice.cursor and not choice.cursor.isdecimal():
            raise InvalidRequest("is none that an earlier answer gave", field="cursor")
        org_ids = await self._orgs(principal, choice.org)
        since_ms = self._context.now_ms() - int(choice.since_s * 1000) if choice.since_s else 0
        found = await self._context.db.read(
            lambda c: ledger.list_audit(
                c,
                org_ids=org_ids,
                actor="" if choice.org else principal.email,
                app=choice.app,
                since_ms=since_ms,
                before_id=int(choice.cursor) if choice.cursor else None,
                limit=choice.limit + 1,
            )
        )
        shown = found[: choice.limit]
        return AuditPage(
            entries=[_entry(record) for record in shown],
            next_cursor=str(shown[-1].id) if len(found) > len(shown) else "",
        )

    async def _orgs(self, principal: Principal, slug: str) -> list[int] | None:
        """Whose acts may be shown; None: everybody's."""
        if await self._is_operator(principal):
            if not slug:
                return None
            found = await self._context.db.read(lambda c: accounts.find_org(c, slug))
            if found is None:
                raise NotFound(f"organization not found: {slug}")
            return [found.id]
        if slug:
            return [(await self._access.org(principal, slug, Action.MANAGE_APPS)).id]
        mine = [
            org_id
            for org_id in sorted(principal.orgs(now_ms=self._context.now_ms()))
            if self._access.allows(principal, Action.MANAGE_APPS, org_id=org_id, app_id=None)
        ]
        if not mine:
            raise Forbidden(NEEDED, hint="a token for one app cannot read it")
        return mine

    async def _is_operator(self, principal: Principal) -> bool:
        try:
            await self._access.operator(principal)
        except UserError:
            return False
        return True


def _entry(record: AuditRecord) -> AuditEntry:
    return AuditEntry(
        id=record.id,
        at=rfc3339_ms(record.at_ms),
        actor=record.actor,
        org=record.org or "",
        action=record.action,
        target=record.target,
        origin=record.origin,
        outcome=record.outcome,
        request_id=record.request_id,
        detail=record.details(),
    )
