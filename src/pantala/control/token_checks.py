"""What a token is and allows, for services that got one from their caller: `/v1/tokens/authenticate`, `authorize`,
`current`. Whoever asks needs a valid token too.
"""

from __future__ import annotations

from sqlalchemy import Connection

from pantala.auth import tokens
from pantala.auth.grants import Action
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import InvalidRequest, NotOffered, Unauthenticated
from pantala.kit.clock import rfc3339_ms
from pantala.store import accounts, apps
from pantala.store.records import MembershipRecord, OrgRecord, TokenRecord
from pantala.wire.platform import (
    AuthenticateRequest,
    AuthorizeRequest,
    AuthorizeResponse,
    CurrentTokens,
    TokenAccess,
    TokenInfo,
    VerifiedToken,
)

ACTIONS = "rwcdC"
"""Read, write, create, delete, control; as a number their bits in this order."""
NOT_OFFERED = ("org_feature", "machine_feature", "volume_id", "mutation", "storage_object", "source_machine")


class TokenChecks:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def authenticate(self, request: AuthenticateRequest) -> VerifiedToken:
        """Raises Unauthenticated when none of its tokens is valid."""
        texts = tokens.from_header(request.header)
        valid = await self._valid(texts)
        if not valid:
            raise Unauthenticated("header: the token is not valid: unknown, revoked or expired")
        expires_at_ms = min(record.expires_at_ms for record in valid.values())
        return VerifiedToken(
            header=f"FlyV1 {','.join(text for text in texts if tokens.digest(text) in valid)}",
            user=next(iter(valid.values())).email,
            expires_at=rfc3339_ms(expires_at_ms),
        )

    async def authorize(self, request: AuthorizeRequest) -> AuthorizeResponse:
        """Raises Forbidden, or NotFound for what the token may not even see."""
        verified = await self.authenticate(AuthenticateRequest(header=request.header))
        principal = await self._access.principal_of(tokens.from_header(request.header))
        access = request.access
        for name in NOT_OFFERED:
            if getattr(access, name):
                raise NotOffered(f"access.{name} is not offered by this version; leave it out")
        letters = _letters(access.action)
        if access.app_name:
            for action in sorted({_on_app(letter, access) for letter in letters}):
                app = await self._access.app(principal, access.app_name, action)
                if access.org_slug and access.org_slug != app.org_slug:
                    raise InvalidRequest(f"the app {app.name} is not in {access.org_slug}", field="access.org_slug")
        elif access.org_slug:
            for letter in letters:
                await self._access.org(principal, access.org_slug, Action.READ if letter == "r" else Action.ADMIN)
        else:
            raise InvalidRequest("an app or an org is required", field="access.app_name")
        return AuthorizeResponse(access=access, verified_token=verified)

    async def current(self, header: str | None) -> CurrentTokens:
        """The tokens of the request itself, one entry for each org that they reach."""
        valid = list((await self._valid(tokens.from_header(header))).values())

        def load(connection: Connection) -> tuple[list[MembershipRecord], dict[int, OrgRecord], dict[int, str]]:
            members = accounts.list_memberships(connection, [record.user_id for record in valid])
            reached = {member.org_id for member in members} | {r.org_id for r in valid if r.org_id is not None}
            named = {r.app_id: apps.get_app_by_id(connection, r.app_id).name for r in valid if r.app_id is not None}
            return members, {org.id: org for org in accounts.list_orgs(connection, sorted(reached))}, named

        members, orgs, names = await self._context.db.read(load)
        found: list[TokenInfo] = []
        for record in valid:
            own = [member.org_id for member in members if member.user_id == record.user_id]
            for org_id in own if record.role == "user" else [record.org_id]:
                org = orgs.get(org_id or 0)
                found.append(
                    TokenInfo(
                        token_id=record.id,
                        org_slug=org.slug if org else "",
                        organization=org.name if org else "",
                        apps=[names[record.app_id]] if record.app_id is not None else [],
                        user=record.email,
                    )
                )
        return CurrentTokens(tokens=found)

    async def _valid(self, texts: list[str]) -> dict[str, TokenRecord]:
        """By digest."""
        now_ms = self._context.now_ms()

        def load(connection: Connection) -> dict[str, TokenRecord]:
            digests = dict.fromkeys(map(tokens.digest, texts))
            found = {digest: accounts.list_tokens(connection, [digest], now_ms=now_ms) for digest in digests}
            return {digest: records[0] for digest, records in found.items() if records}

        return await self._context.db.read(load)


def _letters(action: str | int) -> str:
    if isinstance(action, int):
        if not 1 <= action < 1 << len(ACTIONS):
            raise InvalidRequest(f"{action} is not 1 to {(1 << len(ACTIONS)) - 1}", field="access.action")
        return "".join(letter for bit, letter in enumerate(ACTIONS) if action & 1 << bit)
    if not action or set(action) - set(ACTIONS):
        raise InvalidRequest(f"{action!r} is not made of {', '.join(ACTIONS)}", field="access.action")
    return action


def _on_app(letter: str, access: TokenAccess) -> Action:
    """Creating and deleting the app itself is more than changing what is in it."""
    if letter == "r" and not access.command:
        return Action.READ
    return Action.MANAGE_APPS if letter in "cd" and not access.machine_id and not access.app_feature else Action.DEPLOY
