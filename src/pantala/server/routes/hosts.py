"""`/v1/hosts`: tokens for new hosts, joining with one, the list."""

from __future__ import annotations

from typing import Any

from pantala.server.endpoint import Call, Endpoint
from pantala.wire.hosts import CreateHostTokenRequest, HostToken, HostView, Joined, JoinRequest


async def create_token(call: Call) -> Any:
    return await call.control.hosts.create_token(call.principal, call.body)


async def join(call: Call) -> Any:
    return await call.control.hosts.join(call.body)


async def list_hosts(call: Call) -> Any:
    return await call.control.hosts.list_hosts(call.principal)


ENDPOINTS = [
    Endpoint(
        method="POST",
        path="/v1/hosts/tokens",
        run=create_token,
        body=CreateHostTokenRequest,
        answer=HostToken,
        status=201,
        optional_body=True,
        tag="Hosts",
        summary="A one-time token with which a new host joins",
    ),
    Endpoint(
        method="POST",
        path="/v1/hosts/join",
        run=join,
        body=JoinRequest,
        answer=Joined,
        status=201,
        public=True,
        tag="Hosts",
        summary="Join the cluster; the token in the body is all it takes",
    ),
    Endpoint(
        method="GET",
        path="/v1/hosts",
        run=list_hosts,
        answer=list[HostView],
        tag="Hosts",
        summary="The cluster's hosts",
    ),
]
