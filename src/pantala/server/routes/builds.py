"""`/v1/apps/{app}/builds`: a tar.gz of the context comes in, lines about its build go out.

`BuildOptions` travel as JSON in the header `pantala-build-options` (or the query `options`), because the body is the
context.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pantala.server.endpoint import Call, Endpoint, Stream, decode_body, text
from pantala.wire.api import BuildEvent, BuildOptions

OPTIONS_HEADER = "pantala-build-options"


async def build(call: Call) -> Any:
    text = call.request.headers.get(OPTIONS_HEADER) or call.query("options") or ""
    options: BuildOptions = decode_body(text.encode(), BuildOptions, optional=True)
    return Stream(await call.control.builds.build(call.principal, call.app, options, _upload(call)))


async def _upload(call: Call) -> AsyncIterator[bytes]:
    async for chunk in call.request.stream():
        yield chunk


ENDPOINTS = [
    Endpoint(
        method="POST",
        path="/v1/apps/{app}/builds",
        run=build,
        answer=BuildEvent,
        upload=True,
        query=(text("options", "BuildOptions as JSON, if not in the header"),),
        tag="Builds",
        summary="Build the uploaded context and push the image; one BuildEvent a line",
    ),
]
