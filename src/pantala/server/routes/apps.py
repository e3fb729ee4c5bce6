"""`/v1/apps`, and an app's logs."""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.control.logs import LIMIT_MAX, LogsChoice
from pantala.server.endpoint import Call, Endpoint, Stream, flag, text, whole
from pantala.wire.api import (
    App,
    CreateAppRequest,
    CreateTokenRequest,
    CreateTokenResponse,
    ListAppsResponse,
    LogsResponse,
)
from pantala.wire.polled_logs import LogEntry, PolledLogs, PolledLogsMeta

LOG_LINES = 100


class DeployTokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    expiry: str = "8760h"


async def list_apps(call: Call) -> Any:
    return await call.control.apps.list_apps(
        call.principal, org_slug=call.query("org_slug"), role=call.query("app_role")
    )


async def create_app(call: Call) -> Any:
    return await call.control.apps.create(call.principal, call.body)


async def get_app(call: Call) -> Any:
    return await call.control.apps.get(call.principal, call.app)


async def delete_app(call: Call) -> None:
    await call.control.apps.delete(call.principal, call.app)


async def deploy_token(call: Call) -> Any:
    request = CreateTokenRequest(name=f"deploy {call.app}", app=call.app, expiry=call.body.expiry)
    return await call.control.accounts.create_token(call.principal, request)


async def logs(call: Call) -> Any:
    chosen = LogsChoice(
        machine_id=call.query("instance"),
        region=call.query("region"),
        since_ns=call.number("next_token", default=0),
        limit=call.number("limit", default=LOG_LINES),
    )
    if call.flag("follow"):
        return Stream(await call.control.logs.follow(call.principal, call.app, chosen))
    return await call.control.logs.read(call.principal, call.app, chosen)


async def polled_logs(call: Call) -> PolledLogs:
    """All that came after a token: what is left out is never asked for again."""
    since_ns = call.number("next_token", default=0)
    chosen = LogsChoice(
        machine_id=call.query("instance"),
        region=call.query("region"),
        since_ns=since_ns,
        limit=LIMIT_MAX if since_ns else LOG_LINES,
    )
    read = await call.control.logs.read(call.principal, call.app, chosen)
    return PolledLogs(data=[LogEntry.of(line) for line in read.lines], meta=PolledLogsMeta(next_token=read.next_token))


_APP = "/v1/apps/{app}"
ENDPOINTS = [
    Endpoint(
        method="GET",
        path="/v1/apps",
        run=list_apps,
        answer=ListAppsResponse,
        query=(text("org_slug", "Whose apps", required=True), text("app_role", "Only those of this role")),
        tag="Apps",
        summary="Apps that this token may read",
    ),
    Endpoint(
        method="POST",
        path="/v1/apps",
        run=create_app,
        body=CreateAppRequest,
        answer=App,
        status=201,
        tag="Apps",
        query=(flag("wait", "Read and not needed: the app is there when this is answered"),),
        codes=(501,),
        summary="Create an app; its name is global",
    ),
    Endpoint(method="GET", path=_APP, run=get_app, answer=App, tag="Apps", summary="One app; 403 when somebody else's"),
    Endpoint(
        method="DELETE",
        path=_APP,
        run=delete_app,
        status=202,
        query=(flag("force", "Read and not needed: an app goes with everything in it"),),
        rate="app_deletion",
        tag="Apps",
        summary="Delete an app with everything in it",
    ),
    Endpoint(
        method="POST",
        path=f"{_APP}/deploy_token",
        run=deploy_token,
        body=DeployTokenRequest,
        optional_body=True,
        answer=CreateTokenResponse,
        tag="Apps",
        summary="A token that can deploy this app and nothing else",
    ),
    Endpoint(
        method="GET",
        path=f"{_APP}/logs",
        run=logs,
        answer=LogsResponse,
        streams=True,
        query=(
            whole("next_token", "Nanoseconds since the epoch; lines after it"),
            text("instance", "Of one machine"),
            text("region", "Of machines there"),
            whole("limit", "At most so many lines, the newest", low=1, high=LIMIT_MAX, default=LOG_LINES),
            flag("follow", "Lines as they are written, until the caller stops"),
        ),
        tag="Logs",
        summary="Lines after a token; with follow=true one LogLine a line, as they come",
    ),
    Endpoint(
        method="GET",
        path=f"/api{_APP}/logs",
        run=polled_logs,
        answer=PolledLogs,
        query=(
            text("next_token", "Of the answer before; empty at first, for the newest lines"),
            text("instance", "Of one machine"),
            text("region", "Of machines there"),
        ),
        tag="Logs",
        summary="The same for stock clients, which poll",
    ),
]
