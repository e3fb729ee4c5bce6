"""`/v1/apps/{app}/machines`: the Machines API and its client, superfly/fly-go, decide names, codes and bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.control.machines import LEASE_TTL_S_MAX
from pantala.control.operations import EVENTS_MAX, ORDERS, SORTABLE, WAIT_STATES, WAIT_TIMEOUT_S_MAX
from pantala.domain import signals
from pantala.errors import NotFound, UserError
from pantala.server.endpoint import Call, Endpoint, Param, Raw, choice, flag, text, whole, words
from pantala.wire.api import (
    ExecRequest,
    ExecResponse,
    LaunchMachineRequest,
    LeaseRequest,
    LeaseResponse,
    MachineVersion,
    MemoryRequest,
    MemoryResponse,
    MetadataValue,
    ProcessStat,
    ReclaimRequest,
    ReclaimResponse,
    SetMetadataRequest,
    SignalRequest,
    StartResponse,
    StopRequest,
    UpdateMetadataRequest,
    WaitResponse,
)
from pantala.wire.machine import Event, Machine

WAIT_TIMEOUT_S = 60
READ_FILES = "`pantala ssh console -C` and `pantala ssh sftp get` have no such bound"
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
        with_leases=call.flag("include_leases"),
        summary=call.flag("summary"),
    )


async def create(call: Call) -> Any:
    return await call.control.machines.create(call.principal, call.app, call.body, submitted_config(call))


async def get(call: Call) -> Any:
    return await call.control.projection.get(
        call.principal, call.app, call.machine, with_lease=call.flag("include_leases")
    )


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
        timeout_s=call.seconds("timeout", default=WAIT_TIMEOUT_S),
        version=call.query("version") or call.query("instance_id"),
        from_event_id=call.query("from_event_id"),
    )


async def suspend(call: Call) -> None:
    await call.control.operations.suspend(call.principal, call.app, call.machine, nonce=call.nonce)


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


async def update_metadata(call: Call) -> None:
    await call.control.operations.update_metadata(call.principal, call.app, call.machine, call.body, nonce=call.nonce)


async def remove_metadata(call: Call) -> None:
    await call.control.operations.set_metadata(
        call.principal, call.app, call.machine, call.path("key"), None, nonce=call.nonce
    )


async def events(call: Call) -> Any:
    return await call.control.operations.events(
        call.principal, call.app, call.machine, limit=call.number("limit", default=EVENTS)
    )


async def versions(call: Call) -> Any:
    return await call.control.operations.versions(call.principal, call.app, call.machine)


async def memory(call: Call) -> Any:
    return await call.control.operations.memory(call.principal, call.app, call.machine)


async def set_memory(call: Call) -> Any:
    return await call.control.operations.set_memory(call.principal, call.app, call.machine, call.body, nonce=call.nonce)


async def reclaim_memory(call: Call) -> Any:
    return await call.control.operations.reclaim_memory(
        call.principal, call.app, call.machine, call.body, nonce=call.nonce
    )


# -- inside ------------------------------------------------------------------------------------------------------


async def processes(call: Call) -> Any:
    return await call.control.operations.processes(
        call.principal,
        call.app,
        call.machine,
        sort_by=call.query("sort_by") or "pid",
        order=call.query("order") or "asc",
    )


async def signal(call: Call) -> None:
    await call.control.operations.signal(call.principal, call.app, call.machine, call.body, nonce=call.nonce)


async def run_command(call: Call) -> Any:
    """For who asks for bytes (machines-openapi.yaml) what the command wrote to its standard output."""
    done = await call.control.operations.run_command(
        call.principal, call.app, call.machine, call.body, nonce=call.nonce
    )
    if not call.wants_bytes:
        return done.document()
    if done.truncated:
        raise UserError(f"its output is longer than is kept; {READ_FILES}")
    return Raw(done.stdout)


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
        query=(
            flag("include_deleted", "Destroyed ones too"),
            flag("include_leases", "With the lease that somebody holds"),
            flag("summary", "Without config, checks, events, host_status and leases"),
            words("region", "In one of these"),
            words("state", "In one of these"),
        ),
    ),
    _endpoint("POST", _ALL, create, "Create a machine", body=LaunchMachineRequest, answer=Machine),
    _endpoint(
        "GET",
        _ONE,
        get,
        "One machine, also a destroyed one",
        answer=Machine,
        rate="machine_read",
        query=(flag("include_leases", "With the lease that somebody holds"),),
    ),
    _endpoint("POST", _ONE, update, "Update a machine: a new version", body=LaunchMachineRequest, answer=Machine),
    _endpoint(
        "DELETE",
        _ONE,
        destroy,
        "Destroy a machine",
        query=(flag("force", "Also while it runs"), flag("kill", "The same, as flyctl spells it")),
    ),
    _endpoint("POST", f"{_ONE}/start", start, "Start a machine", answer=StartResponse),
    _endpoint("POST", f"{_ONE}/stop", stop, "Stop a machine", body=StopRequest, optional_body=True),
    _endpoint(
        "POST",
        f"{_ONE}/restart",
        restart,
        "Stop and start a machine",
        query=(
            text("timeout", "How long to wait before killing: a Go duration, or seconds"),
            choice("signal", *signals.ALLOWED, summary="Instead of the one of its config"),
            flag("force_stop", "Kill at once"),
        ),
    ),
    _endpoint("POST", f"{_ONE}/suspend", suspend, "Suspend a machine: its memory is kept"),
    _endpoint(
        "GET",
        f"{_ONE}/wait",
        wait,
        "Wait until a state is reached; 408 when it is not",
        answer=WaitResponse,
        codes=(408,),
        query=(
            words("state", "One of these; started by default", allowed=WAIT_STATES),
            Param(
                name="timeout",
                schema={"type": "integer", "minimum": 1, "maximum": WAIT_TIMEOUT_S_MAX, "default": WAIT_TIMEOUT_S},
                summary="Seconds, or a Go duration",
            ),
            text("version", "Only a state of this version counts"),
            text("instance_id", "The same; deprecated"),
            text("from_event_id", "Only what comes after this event counts"),
        ),
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
        query=(whole("ttl", "Seconds; counts more than the body's", low=1, high=LEASE_TTL_S_MAX),),
    ),
    _endpoint("DELETE", f"{_ONE}/lease", release_lease, "Release a lease"),
    _endpoint("GET", f"{_ONE}/metadata", metadata, "Metadata of a machine", answer=dict[str, str]),
    *(
        _endpoint(
            method,
            f"{_ONE}/metadata",
            update_metadata,
            "Set and remove several values; no new version. 412 when the machine has another version by now",
            body=UpdateMetadataRequest,
            status=204,
        )
        for method in ("PUT", "PATCH")
    ),
    _endpoint("GET", f"{_ONE}/metadata/{{key}}", get_metadata_key, "One value", answer=MetadataValue),
    _endpoint(
        "POST",
        f"{_ONE}/metadata/{{key}}",
        set_metadata,
        "Set one value; no new version",
        body=SetMetadataRequest,
        status=204,
    ),
    _endpoint("DELETE", f"{_ONE}/metadata/{{key}}", remove_metadata, "Remove one value", status=204),
    _endpoint(
        "GET",
        f"{_ONE}/events",
        events,
        "Newest first",
        answer=list[Event],
        query=(whole("limit", low=1, high=EVENTS_MAX, default=EVENTS),),
    ),
    _endpoint("GET", f"{_ONE}/versions", versions, "Its versions, newest first", answer=list[MachineVersion]),
    _endpoint("GET", f"{_ONE}/memory", memory, "What memory it may use", answer=MemoryResponse),
    _endpoint(
        "PUT",
        f"{_ONE}/memory",
        set_memory,
        "Change the limit while it runs, up to its size, until its next start",
        body=MemoryRequest,
        answer=MemoryResponse,
    ),
    _endpoint(
        "POST",
        f"{_ONE}/memory/reclaim",
        reclaim_memory,
        "Take memory from a machine that it does not need now",
        body=ReclaimRequest,
        answer=ReclaimResponse,
    ),
    _endpoint(
        "GET",
        f"{_ONE}/ps",
        processes,
        "Processes and what they listen on",
        answer=list[ProcessStat],
        query=(choice("sort_by", *SORTABLE), choice("order", *ORDERS)),
    ),
    _endpoint("POST", f"{_ONE}/signal", signal, "Send a signal to its app", body=SignalRequest),
    _endpoint(
        "POST",
        f"{_ONE}/exec",
        run_command,
        "Run a command beside its app; 408 when it did not end in time. Who accepts only bytes gets its output",
        bytes_too=True,
        body=ExecRequest,
        answer=ExecResponse,
        codes=(408,),
    ),
]
