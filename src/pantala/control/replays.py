"""Whose replays reach an org's apps beside those of the same org and network. Owns the table replay_sources and the
switch in orgs; the edges learn them from the row `org/<slug>`.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.publication import Publication, org_row
from pantala.errors import InvalidRequest, NotFound
from pantala.store import replays
from pantala.store.records import OrgRecord, ReplayRulesRecord
from pantala.wire.api import ReplayRules, UpdateReplayRules

ROW_BYTES_MAX = 480
"""What a row of the catalogue may carry: some twenty orgs."""


class Replays:
    def __init__(self, context: Context, access: Access, publication: Publication) -> None:
        self._context = context
        self._access = access
        self._publication = publication

    async def get(self, principal: Principal, slug: str) -> ReplayRules:
        org = await self._access.org(principal, slug, Action.ADMIN)
        return _document(await self._context.db.read(lambda c: replays.get_rules(c, org.id)))

    async def update(self, principal: Principal, slug: str, request: UpdateReplayRules) -> ReplayRules:
        """Repeating it changes nothing. Whoever lets another org in must be able to see it."""
        org = await self._access.org(principal, slug, Action.ADMIN)
        added = [await self._source(principal, org, source) for source in request.add]

        def write(connection: Connection) -> ReplayRulesRecord:
            before = replays.get_rules(connection, org.id)
            if request.cross_network is not None:
                replays.set_cross_network(connection, org.id, allowed=request.cross_network)
            for source in added:
                replays.ensure_source(connection, org.id, source.id)
            for source in request.remove:
                if not replays.delete_source(connection, org.id, source):
                    raise NotFound(f"{source} is not among the orgs whose replays reach {slug}")
            after = replays.get_rules(connection, org.id)
            if len(msgspec.json.encode(org_row(after))) > ROW_BYTES_MAX:
                raise InvalidRequest("that are more orgs than fit; remove one first", field="add")
            if after != before:
                self._context.audit(
                    connection,
                    actor=principal.email,
                    org_id=org.id,
                    action="org.replays",
                    target=slug,
                    detail={"cross_network": after.cross_network, "sources": after.sources},
                )
            return after

        rules = await self._context.db.write(write)
        await self._publication.publish_org(org.id)
        return _document(rules)

    async def _source(self, principal: Principal, org: OrgRecord, slug: str) -> OrgRecord:
        if slug == org.slug:
            raise InvalidRequest(f"{slug} always reaches itself; name another org", field="add")
        return await self._access.org(principal, slug, Action.READ)


def _document(rules: ReplayRulesRecord) -> ReplayRules:
    return ReplayRules(cross_network=rules.cross_network, sources=rules.sources)
