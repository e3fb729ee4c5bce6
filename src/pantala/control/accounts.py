"""Users, orgs and tokens. Owns the tables users, orgs, memberships and tokens."""

from __future__ import annotations

import re

from sqlalchemy import Connection

from pantala.auth import tokens
from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import Forbidden, InvalidRequest, NotFound
from pantala.kit import ids
from pantala.kit.clock import rfc3339_ms
from pantala.kit.units import parse_go_duration
from pantala.store import accounts
from pantala.store.records import AppRecord, OrgRecord, TokenRow
from pantala.wire.api import CreateTokenRequest, CreateTokenResponse, OrgRef, TokenInfo, User

EXPIRY_MAX_S = 20 * 366 * 86_400.0
BOOTSTRAP_EXPIRY_S = 10 * 365 * 86_400.0
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


class Accounts:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def bootstrap(self, *, email: str, org: str) -> CreateTokenResponse:
        """The first user as admin of an org, made if they are not there, and a new token of theirs."""
        if not _EMAIL.fullmatch(email):
            raise InvalidRequest(f"{email!r} is not an e-mail address", field="email")
        if not _SLUG.fullmatch(org):
            raise InvalidRequest(f"{org!r} must be lower-case letters, digits and dashes", field="org")
        now_ms = self._context.now_ms()

        def ensure(connection: Connection) -> str:
            user_id = accounts.find_user_id(connection, email)
            if user_id is None:
                user_id = ids.ulid(now_ms)
                accounts.insert_user(connection, user_id=user_id, email=email, now_ms=now_ms)
            found = accounts.find_org(connection, org)
            org_id = found.id if found else accounts.insert_org(connection, slug=org, name=org, now_ms=now_ms)
            accounts.ensure_membership(connection, org_id=org_id, user_id=user_id, role="admin")
            return user_id

        user_id = await self._context.db.write(ensure)
        return await self._issue(
            user_id, actor=email, name="bootstrap", role="user", org=None, app=None, lives_s=BOOTSTRAP_EXPIRY_S
        )

    async def whoami(self, principal: Principal) -> User:
        return User(email=principal.email, orgs=await self.list_orgs(principal))

    async def list_orgs(self, principal: Principal) -> list[OrgRef]:
        org_ids = sorted(principal.orgs(now_ms=self._context.now_ms()))
        found = await self._context.db.read(lambda c: accounts.list_orgs(c, org_ids))
        return [org_ref(org.slug, org.name, org.id) for org in found]

    async def create_token(self, principal: Principal, request: CreateTokenRequest) -> CreateTokenResponse:
        """A token for one app, one org, or (neither named, asked for with the user's own) for the user."""
        lives_s = _expiry(request.expiry)
        app: AppRecord | None = None
        org: OrgRecord | None = None
        if request.app:
            app = await self._access.app(principal, request.app, Action.ISSUE_APP_TOKENS)
            role = "deploy"
        elif request.org_slug:
            org = await self._access.org(principal, request.org_slug, Action.ADMIN)
            role = "admin"
        elif principal.personal:
            role = "user"
        else:
            raise Forbidden("a token for one org or app cannot issue one for its user", hint="name `app` or `org_slug`")
        return await self._issue(
            principal.user_id,
            actor=principal.email,
            name=request.name,
            role=role,
            org=org.id if org else (app.org_id if app else None),
            app=app.id if app else None,
            lives_s=lives_s,
        )

    async def list_tokens(self, principal: Principal) -> list[TokenInfo]:
        """Those that the caller may revoke."""
        return [
            TokenInfo(
                id=row.id,
                name=row.name,
                user=row.email,
                role=row.role,
                org_slug=row.org_slug,
                app=row.app,
                created_at=rfc3339_ms(row.created_at_ms),
                expires_at=rfc3339_ms(row.expires_at_ms),
            )
            for row in await self._context.db.read(lambda c: self._revocable(c, principal, None))
        ]

    async def revoke_token(self, principal: Principal, token_id: str) -> None:
        """From now on it opens nothing; what it holds open (SSH sessions) ends within seconds."""

        def revoke(connection: Connection) -> None:
            found = self._revocable(connection, principal, token_id)
            if not found:
                raise NotFound("token not found")
            accounts.revoke_token(connection, token_id, now_ms=self._context.now_ms())
            self._context.audit(
                connection,
                actor=principal.email,
                org_id=found[0].org_id,
                action="token.revoke",
                target=token_id,
                detail={"name": found[0].name, "user": found[0].email},
            )

        await self._context.db.write(revoke)

    def _revocable(self, connection: Connection, principal: Principal, token_id: str | None) -> list[TokenRow]:
        """One's own, with a token of one's own, and those for orgs of which one is an admin."""
        now_ms = self._context.now_ms()
        org_ids = [
            org_id
            for org_id in sorted(principal.orgs(now_ms=now_ms))
            if self._access.allows(principal, Action.ADMIN, org_id=org_id, app_id=None)
        ]
        user_id = principal.user_id if principal.personal else None
        return accounts.list_revocable(connection, user_id=user_id, org_ids=org_ids, now_ms=now_ms, token_id=token_id)

    async def _issue(
        self, user_id: str, *, actor: str, name: str, role: str, org: int | None, app: int | None, lives_s: float
    ) -> CreateTokenResponse:
        token, token_id = tokens.mint(), ids.ulid(self._context.now_ms())
        now_ms = self._context.now_ms()
        expires_at_ms = now_ms + int(lives_s * 1000)

        def insert(connection: Connection) -> None:
            accounts.insert_token(
                connection,
                token_id=token_id,
                digest=tokens.digest(token),
                name=name,
                user_id=user_id,
                role=role,
                org_id=org,
                app_id=app,
                now_ms=now_ms,
                expires_at_ms=expires_at_ms,
            )
            self._context.audit(
                connection,
                actor=actor,
                org_id=org,
                action="token.create",
                target=token_id,
                detail={"name": name, "role": role},
            )

        await self._context.db.write(insert)
        expires_at = rfc3339_ms(expires_at_ms)
        return CreateTokenResponse(token=token, expires_at=expires_at, id=token_id)


def org_ref(slug: str, name: str, org_id: int) -> OrgRef:
    return OrgRef(name=name, slug=slug, internal_numeric_id=org_id)


def _expiry(text: str) -> float:
    try:
        lives_s = parse_go_duration(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field="expiry") from error
    if not 0 < lives_s <= EXPIRY_MAX_S:
        raise InvalidRequest("must be more than 0 and at most 20 years (175680h)", field="expiry")
    return lives_s
