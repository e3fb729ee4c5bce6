"""Logging in to machines: certificates, and a WebSocket that leads to a machine's SSH port (`wire/ssh.py`)."""

from __future__ import annotations

from typing import Any

import anyio
import structlog
from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect
from litestar.handlers import WebsocketRouteHandler

from pantala.auth.grants import Principal
from pantala.control.context import origin as current_origin
from pantala.control.context import request_id
from pantala.control.ssh import Way
from pantala.errors import PantalaError
from pantala.kit import ids
from pantala.server.endpoint import Call, Endpoint
from pantala.server.served import served
from pantala.wire.node import STREAM_BYTES_MAX
from pantala.wire.ssh import CLOSE_ERROR, CLOSE_REASON_BYTES_MAX, Certificate, CertificateRequest

log = structlog.get_logger()

PATH = "/v1/apps/{app:str}/machines/{machine:str}/ssh"
NORMAL = 1000


async def issue(call: Call) -> Any:
    return await call.control.ssh.issue(call.principal, call.app, call.body)


ENDPOINTS = [
    Endpoint(
        method="POST",
        path="/v1/apps/{app}/ssh_certificates",
        run=issue,
        summary="A certificate to log in to the app's machines with",
        tag="SSH",
        body=CertificateRequest,
        answer=Certificate,
    )
]


async def tunnel(socket: WebSocket[Any, Any, Any]) -> None:
    request_id.set(f"{ids.ulid()}-{served(socket).control.context.settings.default_region}")
    await socket.accept()
    code, reason = NORMAL, ""
    try:
        await _carry(socket)
    except PantalaError as error:
        code, reason = CLOSE_ERROR + min(error.http_code, 999), error.sentence()
    except WebSocketDisconnect:
        return
    text = reason.encode()[:CLOSE_REASON_BYTES_MAX].decode(errors="ignore")
    try:
        await socket.close(code=code, reason=text)
    except (RuntimeError, WebSocketDisconnect):
        log.info("the client was gone before the end", path=socket.url.path)


async def _carry(socket: WebSocket[Any, Any, Any]) -> None:
    control, limits = served(socket)
    authorization = socket.headers.get("authorization")
    app, machine = str(socket.path_params["app"]), str(socket.path_params["machine"])

    async def authenticate() -> Principal:
        return await control.access.authenticate(authorization)

    principal = await authenticate()
    limits.take(f"{principal.user_id}:ssh:{app}")
    origin = socket.headers.get("fly-client-ip") or (socket.client.host if socket.client else "")
    current_origin.set(origin)
    async with control.ssh.session(authenticate, app, machine, origin=origin) as way:
        failure = await _both_ways(way, socket)
        if failure is not None:
            raise failure


async def _both_ways(way: Way, socket: WebSocket[Any, Any, Any]) -> PantalaError | None:
    """Until either side has ended; what else ended it."""
    failures: list[PantalaError] = []
    async with anyio.create_task_group() as tasks:

        async def guarded(work: Any) -> None:
            try:
                await work()
            except PantalaError as error:
                failures.append(error)
            except WebSocketDisconnect:
                log.debug("the client ended the session")
            tasks.cancel_scope.cancel()

        async def from_machine() -> None:
            while data := await way.read():
                await socket.send_bytes(data)

        async def from_client() -> None:
            while True:
                data = await socket.receive_bytes()
                for start in range(0, len(data), STREAM_BYTES_MAX):
                    await way.write(data[start : start + STREAM_BYTES_MAX])

        for work in (from_machine, from_client, way.watch):
            tasks.start_soon(guarded, work)
    return failures[0] if failures else None


TUNNEL = WebsocketRouteHandler(PATH)(tunnel)
