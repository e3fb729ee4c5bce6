"""`/v1/platform`, the registry's token service and the health of this process."""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.auth.grants import Action, Principal
from pantala.control.registry_tokens import LIVES, SERVICE, parse_scope
from pantala.errors import InvalidRequest, UserError
from pantala.kit.clock import rfc3339
from pantala.server.endpoint import Call, Endpoint, Param, text
from pantala.store import hosts
from pantala.wire.api import RegionsResponse
from pantala.wire.platform import PlacementsRequest, PlacementsResponse

SCOPES_MAX = 16


class RegistryToken(msgspec.Struct, frozen=True, kw_only=True):
    """As the distribution project's token authentication wants it."""

    token: str
    access_token: str
    expires_in: int
    issued_at: str


async def regions(call: Call) -> Any:
    return await call.control.platform.regions()


async def placements(call: Call) -> Any:
    return await call.control.placements.simulate(call.principal, call.body)


async def health(call: Call) -> None:
    await call.control.context.db.read(hosts.list_nodes)


async def registry_token(call: Call) -> Any:
    """What is not allowed is left out of the token; the registry then refuses it."""
    if (service := call.query("service")) and service != SERVICE:
        raise InvalidRequest(f"must be {SERVICE}", field="service")
    scopes = [scope for value in call.queries("scope") for scope in value.split()]
    if len(scopes) > SCOPES_MAX:
        raise InvalidRequest(f"at most {SCOPES_MAX} scopes are read", field="scope")
    access: list[dict[str, Any]] = []
    for asked in scopes:
        scope = parse_scope(asked)
        if scope is not None:
            actions = await _allowed(call, call.principal, scope.repository, scope.actions)
            access.append({"type": "repository", "name": scope.repository, "actions": actions})
    tokens = call.control.registry_tokens
    token = tokens.sign(call.principal.email, [entry for entry in access if entry["actions"]])
    return RegistryToken(
        token=token,
        access_token=token,
        expires_in=int(LIVES.total_seconds()),
        issued_at=rfc3339(call.control.context.clock.now()),
    )


async def _allowed(call: Call, principal: Principal, app: str, wanted: tuple[str, ...]) -> list[str]:
    needed = {"pull": Action.READ, "push": Action.DEPLOY}
    allowed: list[str] = []
    for action in wanted:
        try:
            await call.control.access.app(principal, app, needed[action])
        except UserError:
            continue
        allowed.append(action)
    return allowed


ENDPOINTS = [
    Endpoint(
        method="GET",
        path="/v1/platform/regions",
        run=regions,
        answer=RegionsResponse,
        tag="Platform",
        summary="Regions of this cluster and the nearest one",
    ),
    Endpoint(
        method="POST",
        path="/v1/platform/placements",
        run=placements,
        body=PlacementsRequest,
        answer=PlacementsResponse,
        codes=(501,),
        tag="Platform",
        summary="Where machines would go now; nothing is reserved",
    ),
    Endpoint(
        method="GET",
        path="/v2/token",
        run=registry_token,
        answer=RegistryToken,
        query=(
            text("service", "Ours, or nothing"),
            Param(
                name="scope",
                schema={"type": "array", "items": {"type": "string"}, "maxItems": SCOPES_MAX},
                summary="`repository:<app>:pull,push`",
                repeats=True,
            ),
            text("account"),
        ),
        tag="Registry",
        summary="A token for the registry: who may pull and push what",
    ),
    Endpoint(method="GET", path="/healthz", run=health, public=True, tag="Platform", summary="This process serves"),
]
