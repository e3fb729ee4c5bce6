"""`/v1/apps/{app}/ip_assignments`."""

from __future__ import annotations

from typing import Any

from pantala.server.endpoint import Call, Endpoint
from pantala.wire.addresses import AllocateRequest, Assignment, Assignments


async def list_addresses(call: Call) -> Any:
    return await call.control.addresses.list_addresses(call.principal, call.app)


async def allocate(call: Call) -> Any:
    return await call.control.addresses.allocate(call.principal, call.app, call.body)


async def release(call: Call) -> None:
    await call.control.addresses.release(call.principal, call.app, call.path("ip"))


_ALL = "/v1/apps/{app}/ip_assignments"
ENDPOINTS = [
    Endpoint(
        method="GET", path=_ALL, run=list_addresses, answer=Assignments, tag="Addresses", summary="The app's addresses"
    ),
    Endpoint(
        method="POST",
        path=_ALL,
        run=allocate,
        body=AllocateRequest,
        answer=Assignment,
        tag="Addresses",
        summary="Give the app an address from the operator's pools",
    ),
    Endpoint(
        method="DELETE",
        path=f"{_ALL}/{{ip}}",
        run=release,
        status=204,
        tag="Addresses",
        summary="Give an address back",
    ),
]
