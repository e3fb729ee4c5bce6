"""`/v1/apps/{app}/releases`."""

from __future__ import annotations

from typing import Any

from pantala.control.releases import LIST_MAX
from pantala.server.endpoint import Call, Endpoint, whole
from pantala.wire.api import CreateReleaseRequest, ListReleasesResponse, Release, UpdateReleaseRequest

RELEASES = 25


async def list_releases(call: Call) -> Any:
    return await call.control.releases.list_releases(
        call.principal, call.app, limit=call.number("limit", default=RELEASES)
    )


async def create_release(call: Call) -> Any:
    return await call.control.releases.create(call.principal, call.app, call.body)


async def get_release(call: Call) -> Any:
    if call.path("release") == "current":
        return await call.control.releases.current(call.principal, call.app)
    return await call.control.releases.get(call.principal, call.app, call.path("release"))


async def get_definition(call: Call) -> Any:
    return await call.control.releases.definition(call.principal, call.app, call.path("release"))


async def update_release(call: Call) -> Any:
    return await call.control.releases.update(call.principal, call.app, call.path("release"), call.body)


async def withdraw_release(call: Call) -> None:
    await call.control.releases.withdraw(call.principal, call.app, call.path("release"))


_ALL = "/v1/apps/{app}/releases"
_ONE = "/v1/apps/{app}/releases/{release}"
ENDPOINTS = [
    Endpoint(
        method="GET",
        path=_ALL,
        run=list_releases,
        answer=ListReleasesResponse,
        query=(whole("limit", low=1, high=LIST_MAX, default=RELEASES),),
        tag="Releases",
        summary="Newest first",
    ),
    Endpoint(
        method="POST",
        path=_ALL,
        run=create_release,
        body=CreateReleaseRequest,
        answer=Release,
        status=201,
        tag="Releases",
        summary="Record a release",
    ),
    Endpoint(
        method="GET",
        path=_ONE,
        run=get_release,
        answer=Release,
        tag="Releases",
        summary="One release; `current` is the newest completed one",
    ),
    Endpoint(
        method="GET",
        path=f"{_ONE}/definition",
        run=get_definition,
        answer=dict[str, Any],
        tag="Releases",
        summary="The fly.toml it was made from",
    ),
    Endpoint(
        method="PATCH",
        path=_ONE,
        run=update_release,
        body=UpdateReleaseRequest,
        answer=Release,
        tag="Releases",
        summary="Status, plan and cursor of the executor",
    ),
    Endpoint(
        method="DELETE",
        path=_ONE,
        run=withdraw_release,
        status=204,
        tag="Releases",
        summary="Withdraw the newest one while it is not final and has changed nothing",
    ),
]
