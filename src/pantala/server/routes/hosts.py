"""`/v1/hosts`: tokens for new hosts, joining with one, the list, leaving."""

from __future__ import annotations

from typing import Any

from pantala.server.endpoint import Call, Endpoint, flag
from pantala.wire.escape import EscapeReport
from pantala.wire.hosts import (
    CreateHostTokenRequest,
    DrainHostRequest,
    HostDeparture,
    HostToken,
    HostView,
    Joined,
    JoinRequest,
)


async def create_token(call: Call) -> Any:
    return await call.control.hosts.create_token(call.principal, call.body)


async def join(call: Call) -> Any:
    return await call.control.hosts.join(call.body)


async def list_hosts(call: Call) -> Any:
    return await call.control.hosts.list_hosts(call.principal)


async def drain(call: Call) -> Any:
    return await call.control.departures.drain(call.principal, call.path("host"), undo=call.body.undo)


async def departure(call: Call) -> Any:
    return await call.control.departures.progress(call.principal, call.path("host"))


async def lose(call: Call) -> Any:
    return await call.control.departures.lose(call.principal, call.path("host"))


async def remove(call: Call) -> Any:
    return await call.control.departures.remove(call.principal, call.path("host"), force=call.flag("force"))


async def run_escape_suite(call: Call) -> Any:
    return await call.control.escapes.run(call.principal, call.path("host"))


async def last_escape_suite(call: Call) -> Any:
    return await call.control.escapes.last(call.principal, call.path("host"))


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
    Endpoint(
        method="POST",
        path="/v1/hosts/{host}/drain",
        run=drain,
        body=DrainHostRequest,
        answer=HostDeparture,
        optional_body=True,
        tag="Hosts",
        summary="Move a host's machines away, or let it take machines again",
    ),
    Endpoint(
        method="GET",
        path="/v1/hosts/{host}/drain",
        run=departure,
        answer=HostDeparture,
        tag="Hosts",
        summary="What is still on a host that is drained or gone, and why",
    ),
    Endpoint(
        method="POST",
        path="/v1/hosts/{host}/lost",
        run=lose,
        answer=HostDeparture,
        tag="Hosts",
        summary="Declare a host lost for good; its machines without volumes come back elsewhere",
    ),
    Endpoint(
        method="POST",
        path="/v1/hosts/{host}/escape-suite",
        run=run_escape_suite,
        answer=EscapeReport,
        tag="Hosts",
        summary="Try to get out of a machine of this host in every known way; answers when all was tried",
    ),
    Endpoint(
        method="GET",
        path="/v1/hosts/{host}/escape-suite",
        run=last_escape_suite,
        answer=EscapeReport,
        tag="Hosts",
        summary="What became of the last escape suite of a host",
    ),
    Endpoint(
        method="DELETE",
        path="/v1/hosts/{host}",
        run=remove,
        answer=HostDeparture,
        query=(flag("force", "Also with machines on it"),),
        tag="Hosts",
        summary="Take a host out of the cluster",
    ),
]
