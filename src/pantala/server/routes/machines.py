"""`/v1/apps/{app}/machines`: the Machines API and its client, superfly/fly-go, decide names, codes and bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.errors import NotFound, NotOffered
from pantala.server.endpoint import Call, Endpoint
from pantala.wire.api import (
    LaunchMachineRequest,
    LeaseRequest,
    LeaseResponse,
    MetadataValue,
    ProcessStat,
    StartResponse,
    StopRequest,
    WaitResponse,
)
from pantala.wire.machine import Event, Machine

WAIT_TIMEOUT_S = 60
EVENTS = 20


async def list_machines(call: Call) -> Any:
    prefix = "metadata."
    metadata = {
        key.removeprefix(prefix): str(value)
        for key, value in call.request.query_params.items()
        if key.startswith(prefix)
    }
    return await call.control.projection.list_machines(
        call.principal,
        call.app,
        regions=frozenset(call.words("region")),
        states=frozenset(call.words("state")),
        metadata=metadata,
        include_deleted=call.flag("include_deleted"),
    )


async def create(call: Call) -> Any:
    return await call.control.machines.create(call.principal, call.app, call.body, submitted_config(call))


async def get(call: Call) -> Any:
    return await call.control.projection.get(call.principal, call.app, call.machine)


async def update(call: Call) -> Any:
    return await call.control.machines.update(
        call.principal, call.app, call.machine, call.body, submitted_config(call), nonce=call.nonce
    )


async def destroy(call: Call) -> None:
    force = call.flag("force") or call.flag("kill")
    await call.control.machines.destroy(call.principal, call.app, call.machine, force=force, nonce=call.nonce)


def submitted_config(call: Call) -> dict[str, Any]:
    """The config as it was sent, unknown fields and all."""
    config: dict[str, Any] = msgspec.json.decode(call.raw)["config"]
    return config


# -- operations --------------------------------------------------------------------------------------------------


async def start(call: Call) -> Any:
    return await call.control.operations.start(call.principal, call.app, call.machine, nonce=call.nonce)


async def stop(call: Call) -> None:
    await call.control.operations.stop(call.principal, call.app, call.machine, call.body, nonce=call.nonce)


async def restart(call: Call) -> None:
    await call.control.operations.restart(
        call.principal,
        call.app,
        call.machine,
        signal=call.query("signal"),
        timeout=call.query("timeout"),
        force_stop=call.flag("force_stop"),
        nonce=call.nonce,
    )


async def wait(call: Call) -> Any:
    return await call.control.operations.wait(
        call.principal,
        call.app,
        call.machine,
        states=call.words("state") or ["started"],
        timeout_s=call.number("timeout", default=WAIT_TIMEOUT_S),
        version=call.query("version") or call.query("instance_id"),
        from_event_id=call.query("from_event_id"),
    )


async def cordon(call: Call) -> None:
    await call.control.operations.cordon(call.principal, call.app, call.machine, cordoned=True, nonce=call.nonce)


async def uncordon(call: Call) -> None:
    await call.control.operations.cordon(call.principal, call.app, call.machine, cordoned=False, nonce=call.nonce)


async def acquire_lease(call: Call) -> Any:
    request: LeaseRequest = call.body
    if call.query("ttl") is not None:
        request = msgspec.structs.replace(request, ttl=call.number("ttl", default=0))
    return await call.control.operations.acquire_lease(
        call.principal, call.app, call.machine, request, nonce=call.nonce
    )


async def get_lease(call: Call) -> Any:
    return await call.control.operations.get_lease(call.principal, call.app, call.machine)


async def release_lease(call: Call) -> None:
    await call.control.operations.release_lease(call.principal, call.app, call.machine, nonce=call.nonce)


async def metadata(call: Call) -> Any:
    return await call.control.operations.metadata(call.principal, call.app, call.machine)


async def get_metadata_key(call: Call) -> Any:
    found = await call.control.operations.metadata(call.principal, call.app, call.machine)
    key = call.path("key")
    if key not in found:
        raise NotFound(f"metadata key not found: {key}")
    return MetadataValue(value=found[key])


async def set_metadata(call: Call) -> None:
    await call.control.operations.set_metadata(
        call.principal, call.app, call.machine, call.path("key"), call.body.value, nonce=call.nonce
    )


async def remove_metadata(call: Call) -> None:
    await call.control.operations.set_metadata(
        call.principal, call.app, call.machine, call.path("key"), None, nonce=call.nonce
    )


async def events(call: Call) -> Any:
    return await call.control.operations.events(
        call.principal, call.app, call.machine, limit=call.number("limit", default=EVENTS)
    )


async def processes(call: Call) -> Any:
    return await call.control.operations.processes(
        call.principal,
        call.app,
        call.machine,
        sort_by=call.query("sort_by") or "pid",
        descending=call.query("order") == "desc",
    )


async def not_offered(call: Call) -> None:
    what = call.request.url.path.rpartition("/")[2]
    raise NotOffered(f"{what} is not offered by this version of Pantala")


_ALL = "/v1/apps/{app}/machines"
_ONE = "/v1/apps/{app}/machines/{machine}"


def _endpoint(method: str, path: str, run: Any, summary: str, **more: Any) -> Endpoint:
    return Endpoint(method=method, path=path, run=run, summary=summary, tag="Machines", **more)


ENDPOINTS = [
    _endpoint(
        "GET",
        _ALL,
        list_machines,
        "Machines of an app; `metadata.<key>=<value>` filters too",
        answer=list[Machine],
        query=("include_deleted", "region", "state"),
    ),
    _endpoint("POST", _ALL, create, "Create a machine", body=LaunchMachineRequest, answer=Machine),
    _endpoint("GET", _ONE, get, "One machine, also a destroyed one", answer=Machine),
    _endpoint("POST", _ONE, update, "Update a machine: a new version", body=LaunchMachineRequest, answer=Machine),
    _endpoint("DELETE", _ONE, destroy, "Destroy a machine", query=("force", "kill")),
    _endpoint("POST", f"{_ONE}/start", start, "Start a machine", answer=StartResponse),
    _endpoint("POST", f"{_ONE}/stop", stop, "Stop a machine", body=StopRequest, optional_body=True),
    _endpoint(
        "POST", f"{_ONE}/restart", restart, "Stop and start a machine", query=("timeout", "signal", "force_stop")
    ),
    _endpoint(
        "GET",
        f"{_ONE}/wait",
        wait,
        "Wait until a state is reached; 408 when it is not",
        answer=WaitResponse,
        query=("state", "timeout", "version", "instance_id", "from_event_id"),
    ),
    _endpoint("POST", f"{_ONE}/cordon", cordon, "Stop routing requests to a machine"),
    _endpoint("POST", f"{_ONE}/uncordon", uncordon, "Route requests to a machine again"),
    _endpoint("GET", f"{_ONE}/lease", get_lease, "The lease of a machine", answer=LeaseResponse),
    _endpoint(
        "POST",
        f"{_ONE}/lease",
        acquire_lease,
        "Acquire a lease, or refresh it with its nonce",
        status=201,
        body=LeaseRequest,
        optional_body=True,
        answer=LeaseResponse,
        query=("ttl",),
    ),
    _endpoint("DELETE", f"{_ONE}/lease", release_lease, "Release a lease"),
    _endpoint("GET", f"{_ONE}/metadata", metadata, "Metadata of a machine", answer=dict[str, str]),
    _endpoint("GET", f"{_ONE}/metadata/{{key}}", get_metadata_key, "One value", answer=MetadataValue),
    _endpoint(
        "POST",
        f"{_ONE}/metadata/{{key}}",
        set_metadata,
        "Set one value; no new version",
        body=MetadataValue,
        status=204,
    ),
    _endpoint("DELETE", f"{_ONE}/metadata/{{key}}", remove_metadata, "Remove one value", status=204),
    _endpoint("GET", f"{_ONE}/events", events, "Newest first", answer=list[Event], query=("limit",)),
    _endpoint(
        "GET",
        f"{_ONE}/ps",
        processes,
        "Processes and what they listen on",
        answer=list[ProcessStat],
        query=("sort_by", "order"),
    ),
    *(
        _endpoint(method, f"{_ONE}/{name}", not_offered, "Not offered by this version: 501")
        for method, name in (("POST", "suspend"), ("POST", "signal"), ("POST", "exec"), ("GET", "versions"))
    ),
]
