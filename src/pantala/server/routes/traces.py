"""`/v1/traces`."""

from __future__ import annotations

from typing import Any

from pantala.server.endpoint import Call, Endpoint
from pantala.wire.trace import RequestTrace


async def get_trace(call: Call) -> Any:
    return await call.control.traces.get(call.principal, call.path("id"))


ENDPOINTS = [
    Endpoint(
        method="GET",
        path="/v1/traces/{id}",
        run=get_trace,
        answer=RequestTrace,
        tag="Apps",
        summary="Where a request of the last ten minutes was and how long each step took, by its Fly-Request-Id",
    ),
]
