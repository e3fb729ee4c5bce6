"""`/v1/user`, `/v1/orgs` with their machines and what they allow, `/v1/tokens`."""

from __future__ import annotations

from typing import Any

from pantala.control.org_machines import LIMIT_MAX, OrgChoice
from pantala.server.endpoint import Call, Endpoint, flag, text, whole, words
from pantala.wire.api import (
    CreateTokenRequest,
    CreateTokenResponse,
    OrgRef,
    ReplayRules,
    TokenInfo,
    UpdateReplayRules,
    User,
)
from pantala.wire.platform import (
    AuthenticateRequest,
    AuthorizeRequest,
    AuthorizeResponse,
    CurrentTokens,
    OrgMachinesResponse,
    VerifiedToken,
)


async def whoami(call: Call) -> Any:
    return await call.control.accounts.whoami(call.principal)


async def list_orgs(call: Call) -> Any:
    return await call.control.accounts.list_orgs(call.principal)


async def create_token(call: Call) -> Any:
    return await call.control.accounts.create_token(call.principal, call.body)


async def list_tokens(call: Call) -> Any:
    return await call.control.accounts.list_tokens(call.principal)


async def revoke_token(call: Call) -> None:
    await call.control.accounts.revoke_token(call.principal, call.path("token"))


async def get_replay_rules(call: Call) -> Any:
    return await call.control.replays.get(call.principal, call.path("org"))


async def update_replay_rules(call: Call) -> Any:
    return await call.control.replays.update(call.principal, call.path("org"), call.body)


async def org_machines(call: Call) -> Any:
    choice = OrgChoice(
        include_deleted=call.flag("include_deleted"),
        regions=frozenset(call.words("region")),
        states=frozenset(call.words("state")),
        summary=call.flag("summary"),
        updated_after=call.query("updated_after") or "",
        cursor=call.query("cursor") or "",
        limit=call.number("limit", default=LIMIT_MAX),
    )
    return await call.control.org_machines.page(call.principal, call.path("org"), choice)


async def authenticate(call: Call) -> Any:
    return await call.control.token_checks.authenticate(call.body)


async def authorize(call: Call) -> Any:
    return await call.control.token_checks.authorize(call.body)


async def current_tokens(call: Call) -> Any:
    return await call.control.token_checks.current(call.request.headers.get("authorization"))


ENDPOINTS = [
    Endpoint(
        method="GET",
        path="/v1/orgs/{org}/machines",
        run=org_machines,
        answer=OrgMachinesResponse,
        query=(
            flag("include_deleted", "Destroyed ones too"),
            words("region", "In one of these"),
            words("state", "In one of these"),
            flag("summary", "Without config"),
            text("updated_after", "RFC 3339; only what changed since"),
            text("cursor", "`next_cursor` of the page before; counts more than updated_after"),
            whole("limit", low=1, high=LIMIT_MAX, default=LIMIT_MAX),
        ),
        tag="Accounts",
        summary="Machines of all apps of an org, oldest change first, in pages",
    ),
    Endpoint(
        method="POST",
        path="/v1/tokens/authenticate",
        run=authenticate,
        body=AuthenticateRequest,
        answer=VerifiedToken,
        tag="Accounts",
        summary="Is a token valid, and whose is it? 401 when it is not",
    ),
    Endpoint(
        method="POST",
        path="/v1/tokens/authorize",
        run=authorize,
        body=AuthorizeRequest,
        answer=AuthorizeResponse,
        codes=(501,),
        tag="Accounts",
        summary="May a token do this? 403 or 404 when it may not",
    ),
    Endpoint(
        method="GET",
        path="/v1/tokens/current",
        run=current_tokens,
        answer=CurrentTokens,
        tag="Accounts",
        summary="What the tokens of this request reach",
    ),
    Endpoint(method="GET", path="/v1/user", run=whoami, answer=User, tag="Accounts", summary="Who this token is"),
    Endpoint(method="GET", path="/v1/orgs", run=list_orgs, answer=list[OrgRef], tag="Accounts", summary="My orgs"),
    Endpoint(
        method="GET",
        path="/v1/orgs/{org}/replays",
        run=get_replay_rules,
        answer=ReplayRules,
        tag="Accounts",
        summary="Whose replays reach an org's apps",
    ),
    Endpoint(
        method="POST",
        path="/v1/orgs/{org}/replays",
        run=update_replay_rules,
        body=UpdateReplayRules,
        answer=ReplayRules,
        tag="Accounts",
        summary="Change whose replays reach an org's apps",
    ),
    Endpoint(
        method="POST",
        path="/v1/tokens",
        run=create_token,
        body=CreateTokenRequest,
        answer=CreateTokenResponse,
        status=201,
        tag="Accounts",
        summary="Issue a token for an app, an org or oneself",
    ),
    Endpoint(
        method="GET",
        path="/v1/tokens",
        run=list_tokens,
        answer=list[TokenInfo],
        tag="Accounts",
        summary="Valid tokens that the caller may revoke: one's own, and those for orgs that one administers",
    ),
    Endpoint(
        method="DELETE",
        path="/v1/tokens/{token}",
        run=revoke_token,
        status=204,
        tag="Accounts",
        summary="Revoke a token; sessions that it opened end within ten seconds",
    ),
]
