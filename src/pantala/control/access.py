"""The one place where a request is authorised.

Somebody else's things are answered as if they did not exist; only `GET /v1/apps/{name}` says 403, because app names are
public (to flyctl, 403 there means *taken*).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from sqlalchemy import Connection

from pantala.auth import grants, tokens
from pantala.auth.grants import Action, Grant, Principal
from pantala.control.context import Context
from pantala.errors import Forbidden, NotFound, Unauthenticated
from pantala.store import accounts, apps
from pantala.store.records import AppRecord, OrgRecord, TokenRecord

PERSONAL = "personal"


class Access:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def authenticate(self, header: str | None) -> Principal:
        """Who sent this `Authorization` header. Raises Unauthenticated when none of its tokens is valid."""
        return await self.principal_of(tokens.from_header(header))

    async def principal_of(self, texts: Sequence[str]) -> Principal:
        digests = [tokens.digest(text) for text in texts]
        now_ms = self._context.now_ms()

        def load(connection: Connection) -> tuple[list[TokenRecord], list[Grant]]:
            found = accounts.list_tokens(connection, digests, now_ms=now_ms)
            return found, _expand(connection, found)

        found, granted = await self._context.db.read(load)
        if not found:
            raise Unauthenticated("the token is not valid: unknown, revoked or expired", hint="log in again")
        return Principal(
            user_id=found[0].user_id,
            email=found[0].email,
            grants=tuple(granted),
            personal=any(token.role == "user" for token in found),
        )

    async def app(
        self, principal: Principal, name: str, action: Action, *, names_are_public: bool = False
    ) -> AppRecord:
        """The app, if `action` on it is allowed."""
        found = await self._context.db.read(lambda c: apps.find_app(c, name))
        if found is None:
            raise NotFound(f"app not found: {name}")
        if not self.allows(principal, Action.READ, org_id=found.org_id, app_id=found.id):
            if names_are_public:
                raise Forbidden(f"the app {name} belongs to somebody else")
            raise NotFound(f"app not found: {name}")
        if not self.allows(principal, action, org_id=found.org_id, app_id=found.id):
            raise Forbidden(f"this token may not do that with the app {name}", hint=f"it needs the right to {action}")
        return found

    async def org(self, principal: Principal, slug: str, action: Action) -> OrgRecord:
        found = await self.seen_org(principal, slug)
        if not self.allows(principal, action, org_id=found.id, app_id=None):
            raise Forbidden(f"this token may not do that in {slug}", hint=f"it needs the right to {action}")
        return found

    async def seen_org(self, principal: Principal, slug: str) -> OrgRecord:
        """One in which the caller may do something, if only with one app: whoever lists judges each app by itself.

        `personal` is the first of the caller's own (superfly/fly-go sends it), unless an org is called so.
        """
        mine = sorted(principal.orgs(now_ms=self._context.now_ms()))

        def load(connection: Connection) -> OrgRecord | None:
            found = accounts.find_org(connection, slug)
            if found is None and slug == PERSONAL:
                return next(iter(accounts.list_orgs(connection, mine[:1])), None)
            return found

        found = await self._context.db.read(load)
        if found is None or found.id not in mine:
            raise NotFound(f"organization not found: {slug}")
        return found

    async def operator(self, principal: Principal) -> None:
        """Hosts are the business of who runs the platform: the admins of its first org, which `bootstrap` made."""
        first = await self._context.db.read(accounts.find_first_org)
        if first is None or first.id not in principal.orgs(now_ms=self._context.now_ms()):
            raise NotFound("hosts are not yours to see", hint="they belong to the admins of the platform's first org")
        if not self.allows(principal, Action.ADMIN, org_id=first.id, app_id=None):
            raise Forbidden("this token may not do that with hosts", hint=f"it needs the right to {Action.ADMIN}")

    def allows(self, principal: Principal, action: Action, *, org_id: int, app_id: int | None) -> bool:
        return grants.allows(principal.grants, action, org_id=org_id, app_id=app_id, now_ms=self._context.now_ms())


def _expand(connection: Connection, found: list[TokenRecord]) -> list[Grant]:
    """A user's own token follows the memberships; the others say what they are for."""
    granted = [
        Grant(
            role=cast(grants.Role, token.role),
            org_id=token.org_id,
            app_id=token.app_id,
            expires_at_ms=token.expires_at_ms,
        )
        for token in found
        if token.org_id is not None and token.role != "user"
    ]
    lives = {token.user_id: token.expires_at_ms for token in found if token.role == "user"}
    for membership in accounts.list_memberships(connection, list(lives)):
        expires_at_ms = lives[membership.user_id]
        role = cast(grants.Role, membership.role)
        granted.append(Grant(role=role, org_id=membership.org_id, expires_at_ms=expires_at_ms))
    return granted
