"""Is a machine config acceptable? Every refusal names its field and what would be right. Pure.

Called by control when a request arrives and by the agent before it journals one; nothing is half done.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from pantala.domain import guests, schedule
from pantala.domain.durations import seconds
from pantala.domain.validate_containers import check_containers
from pantala.domain.validate_program import (
    check_files,
    check_own_variables,
    check_restart,
    check_stop,
    check_variables,
)
from pantala.errors import InvalidRequest
from pantala.wire.machine import Check, Concurrency, Guest, MachineConfig, Mount, Port, Process, Service, Static

HANDLERS = ("http", "tls", "pg_tls", "proxy_proto", "edge_http")
NOT_ALPN = "is no name of a protocol: 1 to 255 bytes"
TLS_VERSIONS = ("TLSv1.2", "TLSv1.3")
PROXY_PROTO_WITH_HTTP = (
    "proxy_proto does not go with http, whose requests say who calls in Fly-Client-IP and X-Forwarded-For; leave out "
    "proxy_proto, or http for an app that reads the PROXY header itself"
)
CHECK_TYPES = ("tcp", "http")
SERVICES_MAX = 64
STATICS_MAX = 10
PROCESSES_MAX = 16
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
STANDBYS_MAX = 10


def validate_config(config: MachineConfig) -> None:
    """Raises InvalidRequest for the first thing that is wrong."""
    if not config.image and not config.containers:
        raise InvalidRequest("an image is required", field="config.image")
    guests.resolve(config)
    if len(config.services or []) > SERVICES_MAX:
        raise InvalidRequest(f"at most {SERVICES_MAX} services", field="config.services")
    for index, service in enumerate(config.services or []):
        _service(service, f"config.services[{index}]")
    for name, check in (config.checks or {}).items():
        _check(check, f"config.checks.{name}", port_required=True)
    _mounts(config.mounts or [])
    check_restart(config.restart, "config.restart")
    check_stop(config.stop_config, "config.stop_config")
    check_variables(config.env or {}, "config.env")
    check_files(config.files, "config.files")
    _statics(config.statics or [])
    _schedule(config)
    _processes(config.processes or [])
    check_containers(config)
    for name in ("cache_drive", "spot"):
        if getattr(config, name):
            raise InvalidRequest("is not offered yet; leave it out", field=f"config.{name}")
    _standbys(config)


def _schedule(config: MachineConfig) -> None:
    if not config.schedule:
        return
    schedule.check(config.schedule)
    if config.auto_destroy:
        raise InvalidRequest("a scheduled machine runs again; leave auto_destroy out", field="config.auto_destroy")


def _standbys(config: MachineConfig) -> None:
    field = "config.standbys"
    if not config.standbys:
        return
    if len(config.standbys) > STANDBYS_MAX:
        raise InvalidRequest(f"{len(config.standbys)} machines; at most {STANDBYS_MAX}", field=field)
    if config.services:
        raise InvalidRequest("a machine with services cannot stand by: requests would wake it", field=field)
    if config.schedule or config.auto_destroy:
        raise InvalidRequest("a standby starts when a host is lost; leave schedule and auto_destroy out", field=field)


def speaks_http(handlers: Sequence[str] | None) -> bool:
    return not {"http", "edge_http"}.isdisjoint(handlers or ())


def autostop(service: Service, field: str = "autostop") -> str:
    """`off`, `stop` or `suspend` of the spellings a service may use."""
    value = service.autostop
    if value in (None, False, "off", "false"):
        return "off"
    if value in (True, "stop", "true"):
        return "stop"
    if value == "suspend":
        return "suspend"
    raise InvalidRequest(f"{value!r} is not one of true, false, off, stop, suspend", field=field)


def is_alpn(name: str) -> bool:
    return 1 <= len(name.encode()) <= 255


def _port_number(value: int | None, field: str) -> int:
    if value is None:
        raise InvalidRequest("a port is required", field=field)
    if not 1 <= value <= 65535:
        raise InvalidRequest(f"{value} is not a port; ports are 1 to 65535", field=field)
    return value


def _service(service: Service, field: str) -> None:
    protocol = service.protocol or "tcp"
    if protocol == "udp":
        raise InvalidRequest("UDP services are not offered yet", field=f"{field}.protocol")
    if protocol != "tcp":
        raise InvalidRequest(f"{protocol!r} is not one of tcp, udp", field=f"{field}.protocol")
    _port_number(service.internal_port, f"{field}.internal_port")
    for index, port in enumerate(service.ports or []):
        _port(port, f"{field}.ports[{index}]")
    _concurrency(service.concurrency, f"{field}.concurrency")
    autostop(service, f"{field}.autostop")
    if (service.min_machines_running or 0) < 0:
        raise InvalidRequest("cannot be negative", field=f"{field}.min_machines_running")
    for index, check in enumerate(service.checks or []):
        _check(check, f"{field}.checks[{index}]", port_required=False)


def _port(port: Port, field: str) -> None:
    if port.port is None:
        start = _port_number(port.start_port, f"{field}.port")
        end = _port_number(port.end_port, f"{field}.end_port")
        if end < start:
            raise InvalidRequest(f"{end} is below start_port {start}", field=f"{field}.end_port")
    else:
        _port_number(port.port, f"{field}.port")
    for index, handler in enumerate(port.handlers or []):
        if handler not in HANDLERS:
            raise InvalidRequest(
                f"{handler!r} is not a handler; one of {', '.join(HANDLERS)}", field=f"{field}.handlers[{index}]"
            )
    for index, handler in enumerate(port.handlers or []):
        if handler == "proxy_proto" and speaks_http(port.handlers):
            raise InvalidRequest(PROXY_PROTO_WITH_HTTP, field=f"{field}.handlers[{index}]")
    for index, name in enumerate((port.tls_options.alpn if port.tls_options else None) or []):
        if not is_alpn(name):
            raise InvalidRequest(f"{name!r} {NOT_ALPN}", field=f"{field}.tls_options.alpn[{index}]")
    if port.force_https and "http" not in (port.handlers or []):
        raise InvalidRequest("needs the http handler on this port", field=f"{field}.force_https")


def _concurrency(limits: Concurrency | None, field: str) -> None:
    if limits is None:
        return
    if limits.type not in (None, "", "connections", "requests"):
        raise InvalidRequest(f"{limits.type!r} is not one of connections, requests", field=f"{field}.type")
    for name, value in (("soft_limit", limits.soft_limit), ("hard_limit", limits.hard_limit)):
        if value is not None and value < 0:
            raise InvalidRequest("cannot be negative", field=f"{field}.{name}")
    if limits.soft_limit and limits.hard_limit and limits.soft_limit > limits.hard_limit:
        raise InvalidRequest(
            f"{limits.soft_limit} is above hard_limit {limits.hard_limit}", field=f"{field}.soft_limit"
        )


def _check(check: Check, field: str, *, port_required: bool) -> None:
    if check.type not in CHECK_TYPES:
        raise InvalidRequest(f"{check.type!r} is not one of {', '.join(CHECK_TYPES)}", field=f"{field}.type")
    if port_required or check.port is not None:
        _port_number(check.port, f"{field}.port")
    if check.protocol not in (None, "", "http", "https"):
        raise InvalidRequest(f"{check.protocol!r} is not one of http, https", field=f"{field}.protocol")
    if check.path and not check.path.startswith("/"):
        raise InvalidRequest(f"{check.path!r} does not begin with /", field=f"{field}.path")
    for name, value, low_s in (
        ("interval", check.interval, 0.5),
        ("timeout", check.timeout, 0.05),
        ("grace_period", check.grace_period, 0.0),
    ):
        if value is not None and value != "":
            given_s = seconds(value, field=f"{field}.{name}", default=low_s)
            if not low_s <= given_s <= 3600:
                raise InvalidRequest(f"{value!r} is not between {low_s:g}s and 1h", field=f"{field}.{name}")


def _processes(processes: list[Process]) -> None:
    if len(processes) > PROCESSES_MAX:
        raise InvalidRequest(f"at most {PROCESSES_MAX} processes", field="config.processes")
    for index, process in enumerate(processes):
        check_own_variables(process.env, process.secrets, process.env_from, f"config.processes[{index}]")


def _mounts(mounts: list[Mount]) -> None:
    if len(mounts) > 1:
        raise InvalidRequest("a machine has at most one mount", field="config.mounts")
    if mounts:
        raise InvalidRequest("volumes are not offered yet; leave it out", field="config.mounts")


def _statics(statics: list[Static]) -> None:
    if len(statics) > STATICS_MAX:
        raise InvalidRequest(f"{len(statics)} mappings; at most {STATICS_MAX}", field="config.statics")
    prefixes: list[str] = []
    for index, item in enumerate(statics):
        field = f"config.statics[{index}]"
        if not item.url_prefix.startswith("/"):
            raise InvalidRequest(f"{item.url_prefix!r} does not begin with /", field=f"{field}.url_prefix")
        if item.tigris_bucket:
            _bucket(item.tigris_bucket, item.guest_path, field)
        elif item.index_document:
            raise InvalidRequest("only files of a tigris_bucket have one", field=f"{field}.index_document")
        elif not item.guest_path.startswith("/"):
            raise InvalidRequest(f"{item.guest_path!r} is not an absolute path", field=f"{field}.guest_path")
        prefix = item.url_prefix.rstrip("/") + "/"
        for other in prefixes:
            if prefix.startswith(other) or other.startswith(prefix):
                raise InvalidRequest(f"{prefix} and {other} overlap", field=f"{field}.url_prefix")
        prefixes.append(prefix)


def _bucket(name: str, folder: str, field: str) -> None:
    if not BUCKET_NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no name of a bucket", field=f"{field}.tigris_bucket")
    if any(part in (".", "..") for part in folder.split("/")):
        raise InvalidRequest(f"{folder!r} has . or .. in it", field=f"{field}.guest_path")


def normalized(config: MachineConfig) -> MachineConfig:
    """The config with an explicit guest, so that what runs can be read from the answer."""
    size = guests.resolve(config)
    guest = msgspec.structs.replace(
        config.guest or Guest(), cpu_kind=size.cpu_kind, cpus=size.cpus, memory_mb=size.memory_mb
    )
    return msgspec.structs.replace(config, size=None, guest=guest)
