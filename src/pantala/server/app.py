"""The ASGI application: one Litestar route per endpoint, and what all of them share.

In order: request id, who asks, how often, bounded body, idempotency, the route, the answer or the error body.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator
from functools import cache
from typing import Any, cast

import msgspec
import structlog
from litestar import Litestar, Request, Response
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.response import Stream as StreamingResponse
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from pantala.control.context import origin as current_origin
from pantala.control.context import request_id as current_request_id
from pantala.control.idempotency import KeptAnswer
from pantala.control.service import Control
from pantala.errors import InternalError, InvalidRequest, PantalaError
from pantala.kit import ids
from pantala.server import bodies, openapi
from pantala.server.endpoint import BYTES, Call, Endpoint, Raw, Stream, decode_body
from pantala.server.limits import RateLimits
from pantala.server.overload import BODIES_AT_ONCE_MAX, bounded
from pantala.server.routes import all_endpoints
from pantala.server.routes.ssh import TUNNEL
from pantala.server.served import served, serving
from pantala.wire.api import ErrorBody
from pantala.wire.server import AT_ONCE_MAX, WAITS_AT_ONCE_MAX

log = structlog.get_logger()

JSON = "application/json"
NDJSON = "application/x-ndjson"
MUTATING = ("POST", "PUT", "PATCH", "DELETE")


def make_app(
    control: Control,
    limits: RateLimits,
    *,
    at_once: int = AT_ONCE_MAX,
    waits: int = WAITS_AT_ONCE_MAX,
    bodies_at_once: int = BODIES_AT_ONCE_MAX,
    body_within_s: float = bodies.WITHIN_S,
    upload_silent_s: float = bodies.SILENT_S,
) -> ASGIApp:
    # Outside, so that they see refused routes too.
    bounds = bounded(
        serving(_routes(), control, limits),
        at_once=at_once,
        waits=waits,
        bodies_at_once=bodies_at_once,
        body_within_s=body_within_s,
        upload_silent_s=upload_silent_s,
    )
    return _observed(bounds, control.context.settings.default_region)


@cache
def _routes() -> Litestar:
    """Every route, once a process: to make them takes a tenth of a second. Whom they serve is in a request's scope."""
    return Litestar(
        route_handlers=[
            *(_route(endpoint) for endpoint in all_endpoints()),
            TUNNEL,
            _document("/openapi.json", openapi.document()),
        ],
        exception_handlers={HTTPException: _framework_error},
        openapi_config=None,
        request_max_body_size=None,  # bounded below, for each kind of endpoint
        logging_config=None,
    )


def _route(endpoint: Endpoint) -> HTTPRouteHandler:
    async def handle(request: Request[Any, Any, Any]) -> Response[Any]:
        try:
            return await _serve(endpoint, request)
        except PantalaError as error:
            return error_response(error)
        except msgspec.MsgspecError as error:
            log.exception("a document could not be written")
            return error_response(InternalError(str(error)))

    path = endpoint.path.replace("}", ":str}")
    # The answer carries its own status; 200 here only stops Litestar from judging the handler by it.
    return HTTPRouteHandler(path, http_method=cast(HttpMethod, endpoint.method), status_code=200)(handle)


async def _serve(endpoint: Endpoint, request: Request[Any, Any, Any]) -> Response[Any]:
    control, limits = served(request)
    authorization = request.headers.get("authorization")
    principal = None if endpoint.public else await control.access.authenticate(authorization)
    who = hashlib.sha256((authorization or "").encode()).hexdigest()
    limits.take(_counted(endpoint, request, who), endpoint.rate)
    call = Call(request, control, principal)
    if endpoint.upload or endpoint.streams:
        return _stream(endpoint, await endpoint.run(call))
    call.raw = await _bounded_body(request, endpoint.body_bytes_max)
    key = request.headers.get("idempotency-key") if endpoint.method in MUTATING else None
    if key is None:
        return _response(await _answer(endpoint, call))
    asked = f"{endpoint.method} {request.url.path}?{request.url.query}\n".encode() + call.raw
    kept = await control.idempotency.begin(scope=who, key=key, request=asked)
    if kept is not None:
        return _response(kept)
    try:
        answer = await _answer(endpoint, call)
    except PantalaError as error:
        answer = _error_answer(error)
    except BaseException:
        await control.idempotency.forget(scope=who, key=key)
        raise
    await control.idempotency.finish(scope=who, key=key, answer=answer)
    return _response(answer)


def _counted(endpoint: Endpoint, request: Request[Any, Any, Any], who: str) -> str:
    """One caller's action on one machine, else on one app; deletions of apps are counted together."""
    parts = request.path_params
    what = "" if endpoint.rate == "app_deletion" else str(parts.get("machine") or parts.get("app") or "")
    return f"{who}:{endpoint.method}:{endpoint.path}:{what}"


async def _answer(endpoint: Endpoint, call: Call) -> KeptAnswer:
    if endpoint.body is not None:
        call.body = decode_body(call.raw, endpoint.body, optional=endpoint.optional_body)
    result = await endpoint.run(call)
    if endpoint.status == 204:
        return KeptAnswer(code=204, content_type="", body=b"")
    if isinstance(result, Raw):
        return KeptAnswer(code=endpoint.status, content_type=BYTES, body=result.body)
    body = msgspec.json.encode({"ok": True} if result is None else result)
    return KeptAnswer(code=endpoint.status, content_type=JSON, body=body)


def _response(answer: KeptAnswer) -> Response[Any]:
    if answer.code == 204:
        return Response(content=None, status_code=204)
    return Response(content=answer.body, status_code=answer.code, media_type=answer.content_type)


def _stream(endpoint: Endpoint, result: Any) -> Response[Any]:
    """A streaming endpoint may still answer one document (logs without `follow`)."""
    if not isinstance(result, Stream):
        return Response(content=msgspec.json.encode(result), status_code=endpoint.status, media_type=JSON)

    async def lines() -> AsyncGenerator[bytes]:
        async for item in result.items:
            yield msgspec.json.encode(item) + b"\n"

    return StreamingResponse(lines(), status_code=endpoint.status, media_type=NDJSON)


async def _bounded_body(request: Request[Any, Any, Any], bytes_max: int) -> bytes:
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > bytes_max:
            raise InvalidRequest(f"is larger than {bytes_max} bytes", field="body")
    return bytes(received)


# -- errors ------------------------------------------------------------------------------------------------------


def error_response(error: PantalaError) -> Response[Any]:
    response = _response(_error_answer(error))
    if retry_after_s := getattr(error, "retry_after_s", None):
        response.headers["retry-after"] = str(max(1, round(retry_after_s)))
    if error.http_code == 401:
        response.headers["www-authenticate"] = 'Basic realm="pantala"'
    return response


def _error_answer(error: PantalaError) -> KeptAnswer:
    if isinstance(error, InternalError):
        incident = error.incident or current_request_id.get()
        log.error("request failed", incident=incident, error=error.message, exc_info=error)
        body = ErrorBody(
            error=f"something went wrong here; the operator finds it under {incident}", status=error.status
        )
    else:
        body = ErrorBody(error=error.sentence(), status=error.status)
    # Clients repeat 502 and 503 whatever the method (`flaps.go` of superfly/fly-go does), so these two are never sent.
    code = 500 if error.http_code in (502, 503) else error.http_code
    return KeptAnswer(code=code, content_type=JSON, body=msgspec.json.encode(body))


def _framework_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """What Litestar itself refuses: no such route, wrong method, a client that went away in the middle."""
    words = {404: "not_found", 405: "method_not_allowed"}
    sentence = f"there is no {request.method} {request.url.path}" if error.status_code in words else error.detail
    body = ErrorBody(error=sentence, status=words.get(error.status_code, "unknown"))
    return Response(content=msgspec.json.encode(body), status_code=error.status_code, media_type=JSON)


# -- around every request ----------------------------------------------------------------------------------------


def _observed(app: ASGIApp, region: str) -> ASGIApp:
    """Gives each request its id, and one line in the log."""

    async def observe(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request_id, began = f"{ids.ulid()}-{region}", time.monotonic()
        current_request_id.set(request_id)
        current_origin.set(_origin(scope))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"fly-request-id", request_id.encode())]
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        finally:
            took_ms = round((time.monotonic() - began) * 1000, 1)
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                took_ms=took_ms,
                request_id=request_id,
            )

    return observe


def _origin(scope: Scope) -> str:
    """Whose address it is: what the edge says, which lets no client say it, else the other end of the connection. Who
    reaches this server past the edge, on the hosts' own network, may say what he likes."""
    told = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"fly-client-ip"), "")
    client = scope.get("client")
    return told or (client[0] if client else "")


def _document(path: str, document: dict[str, Any]) -> HTTPRouteHandler:
    text = msgspec.json.encode(document)

    async def handle() -> Response[Any]:
        return Response(content=text, media_type=JSON)

    return HTTPRouteHandler(path, http_method="GET", status_code=200)(handle)
