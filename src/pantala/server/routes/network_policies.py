"""`/v1/apps/{app}/network_policies`."""

from __future__ import annotations

from typing import Any

from pantala.server.endpoint import Call, Endpoint
from pantala.wire.network_policies import NetworkPolicy, PutNetworkPolicy


async def list_policies(call: Call) -> Any:
    return await call.control.network_policies.list_policies(call.principal, call.app)


async def put(call: Call) -> Any:
    return await call.control.network_policies.put(call.principal, call.app, call.body)


async def get(call: Call) -> Any:
    return await call.control.network_policies.get(call.principal, call.app, call.path("policy"))


async def delete(call: Call) -> None:
    await call.control.network_policies.delete(call.principal, call.app, call.path("policy"))


_ALL = "/v1/apps/{app}/network_policies"
_ONE = f"{_ALL}/{{policy}}"
_TAG = "Network policies"

ENDPOINTS = [
    Endpoint(
        method="GET",
        path=_ALL,
        run=list_policies,
        answer=list[NetworkPolicy],
        tag=_TAG,
        summary="Network policies of an app",
    ),
    Endpoint(
        method="POST",
        path=_ALL,
        run=put,
        body=PutNetworkPolicy,
        answer=NetworkPolicy,
        codes=(422,),
        tag=_TAG,
        summary="Create or change a network policy",
    ),
    Endpoint(method="GET", path=_ONE, run=get, answer=NetworkPolicy, tag=_TAG, summary="One network policy"),
    Endpoint(method="DELETE", path=_ONE, run=delete, status=204, tag=_TAG, summary="Remove a network policy"),
]
