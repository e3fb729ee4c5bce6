"""`/v1/user`, `/v1/orgs` with what they allow, `/v1/tokens`."""

from __future__ import annotations

from typing import Any

from pantala.server.endpoint import Call, Endpoint
from pantala.wire.api import CreateTokenRequest, CreateTokenResponse, OrgRef, ReplayRules, UpdateReplayRules, User


async def whoami(call: Call) -> Any:
    return await call.control.accounts.whoami(call.principal)


async def list_orgs(call: Call) -> Any:
    return await call.control.accounts.list_orgs(call.principal)


async def create_token(call: Call) -> Any:
    return await call.control.accounts.create_token(call.principal, call.body)


async def get_replay_rules(call: Call) -> Any:
    return await call.control.replays.get(call.principal, call.path("org"))


async def update_replay_rules(call: Call) -> Any:
    return await call.control.replays.update(call.principal, call.path("org"), call.body)


ENDPOINTS = [
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
]
