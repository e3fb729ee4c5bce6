"""`[http_service]`, `[[services]]` and checks, as the fly.toml reference describes them."""

from __future__ import annotations

from typing import Any

from pantala.appconfig.model import GroupCheck, GroupService
from pantala.appconfig.reading import Table
from pantala.domain.validate import NOT_ALPN, PROXY_PROTO_WITH_HTTP, TLS_VERSIONS, is_alpn, speaks_http
from pantala.kit.units import format_go_duration
from pantala.wire.machine import (
    Check,
    Concurrency,
    HTTPHeader,
    HTTPOptions,
    HTTPResponseOptions,
    Port,
    ProxyProtoOptions,
    ReplayCache,
    Service,
    TLSOptions,
)

HANDLERS = ("http", "tls", "pg_tls", "proxy_proto", "edge_http")
SERVICE_CHECK_S_MIN, SERVICE_CHECK_S_MAX = 1.0, 60.0


def read_services(root: Table) -> tuple[GroupService, ...]:
    services: list[GroupService] = []
    if table := root.table("http_service"):
        services.append(_http_service(table))
    services += [_service(table) for table in root.tables("services")]
    return tuple(services)


def read_top_level_checks(root: Table) -> tuple[GroupCheck, ...]:
    """`[checks.<name>]`: reported, never gate routing. The port is filled in later from the service."""
    checks: list[GroupCheck] = []
    for name, table in root.named_tables("checks"):
        kind = table.string("type")
        if kind not in ("http", "tcp"):
            table.error("type", "Missing or invalid check type, must be 'http' or 'tcp'")
        interval = table.seconds("interval", bare_unit_s=0.001)
        timeout = table.seconds("timeout", bare_unit_s=0.001)
        if interval is not None and interval < 2:
            table.error("interval", "must be at least 2s")
        if timeout is not None and timeout > 60:
            table.error("timeout", "must be at most 1m")
        check = _check(table, kind=kind or "tcp", port=table.port("port"), interval=interval, timeout=timeout)
        checks.append(GroupCheck(name=name, check=check, processes=tuple(table.strings("processes") or ())))
        table.done()
    return tuple(checks)


def _http_service(table: Table) -> GroupService:
    """One TCP service with ports 80 (`http`) and 443 (`http`, `tls`)."""
    internal_port = table.port("internal_port")
    if internal_port is None and table.raw("internal_port")[1] is None:
        table.error("internal_port", "is required: the port that the app listens on")
    options = _http_options(table.table("http_options"))
    ports = [
        Port(port=80, handlers=["http"], force_https=table.boolean("force_https") or None, http_options=options),
        Port(
            port=443,
            handlers=["http", "tls"],
            http_options=options,
            tls_options=_tls_options(table.table("tls_options")),
        ),
    ]
    checks = [_service_check(check, kind="http") for check in table.tables("checks")]
    return _finish(table, internal_port=internal_port, protocol="tcp", ports=ports, checks=checks)


def _service(table: Table) -> GroupService:
    protocol = table.choice("protocol", ("tcp", "udp")) or "tcp"
    ports = [_port(entry) for entry in table.tables("ports")]
    if not ports:
        table.document.warn(table.field("ports"), "Service must expose at least one port. Add a [[services.ports]]")
    checks = [_service_check(check, kind="tcp") for check in table.tables("tcp_checks")]
    checks += [_service_check(check, kind="http") for check in table.tables("http_checks")]
    return _finish(
        table, internal_port=table.port("internal_port") or 8080, protocol=protocol, ports=ports, checks=checks
    )


def _finish(
    table: Table, *, internal_port: int | None, protocol: str, ports: list[Port], checks: list[Check]
) -> GroupService:
    if table.tables("machine_checks"):
        table.document.warn(table.field("machine_checks"), "not supported yet, kept but not used")
    autostart = table.boolean("auto_start_machines")
    service = Service(
        protocol=protocol,
        internal_port=internal_port,
        ports=ports,
        concurrency=_concurrency(table),
        autostop=_autostop(table),
        autostart=True if autostart is None else autostart,
        min_machines_running=table.integer("min_machines_running", low=0) or 0,
        checks=checks or None,
    )
    group = GroupService(service=service, processes=tuple(table.strings("processes") or ()))
    table.done()
    return group


def _autostop(table: Table) -> bool | str:
    """As the wire echoes it: false, true or "suspend"."""
    key, value = table.raw("auto_stop_machines")
    if value is None or value in (False, "off"):
        return False
    if value in (True, "stop"):
        return True
    if value == "suspend":
        return "suspend"
    table.error(key, f'invalid autostop string value "{value}"; it must be off, stop or suspend')
    return False


def _concurrency(table: Table) -> Concurrency:
    _, value = table.raw("concurrency")
    if isinstance(value, str):  # the old form "soft,hard"
        soft, comma, hard = value.partition(",")
        if comma and soft.strip().isdigit() and hard.strip().isdigit():
            return Concurrency(type="requests", soft_limit=int(soft), hard_limit=int(hard))
        table.error("concurrency", f'{value!r} is not of the form "soft,hard"')
        return Concurrency(type="connections", soft_limit=20)
    if not (inner := table.table("concurrency")):
        return Concurrency(type="connections", soft_limit=20)
    soft, hard = inner.integer("soft_limit", low=0), inner.integer("hard_limit", low=0)
    if soft and hard and soft > hard:
        inner.error("soft_limit", f"{soft} is above hard_limit {hard}")
    concurrency = Concurrency(
        type=inner.choice("type", ("connections", "requests")) or "connections",
        soft_limit=soft or 20,
        hard_limit=hard or None,
    )
    inner.done()
    return concurrency


def _port(table: Table) -> Port:
    handlers = table.strings("handlers") or []
    for handler in handlers:
        if handler not in HANDLERS:
            table.error("handlers", f"{handler!r} is not one of {', '.join(HANDLERS)}")
    if "proxy_proto" in handlers and speaks_http(handlers):
        table.error("handlers", PROXY_PROTO_WITH_HTTP)
    force_https = table.boolean("force_https")
    if force_https and not {"http", "edge_http"} & set(handlers):
        table.error("force_https", "is only valid with the http handler")
    port, start, end = table.port("port"), table.port("start_port"), table.port("end_port")
    if port is None and start is None and table.raw("port")[1] is None:
        table.error("port", "is required: one port, or start_port and end_port")
    if (start is None) != (end is None) or (start and end and start > end):
        table.error("start_port", "start_port and end_port make a range together")
    proto = table.table("proxy_proto_options")
    result = Port(
        port=port,
        start_port=start,
        end_port=end,
        handlers=["http" if handler == "edge_http" else handler for handler in handlers],
        force_https=force_https or None,
        http_options=_http_options(table.table("http_options")),
        tls_options=_tls_options(table.table("tls_options")),
        proxy_proto_options=ProxyProtoOptions(version=proto.choice("version", ("v1", "v2"))) if proto else None,
    )
    table.done()
    return result


def _http_options(table: Table | None) -> HTTPOptions | None:
    if table is None:
        return None
    response = None
    if inner := table.table("response"):
        response = HTTPResponseOptions(headers=inner.mapping("headers") or None, pristine=inner.boolean("pristine"))
        inner.done()
    caches: list[ReplayCache] = []
    for cache in table.tables("replay_cache"):
        caches.append(
            ReplayCache(
                path_prefix=cache.string("path_prefix"),
                ttl_seconds=cache.integer("ttl_seconds", low=10),
                type=cache.choice("type", ("cookie", "header")),
                name=cache.string("name"),
                allow_bypass=cache.boolean("allow_bypass"),
            )
        )
        cache.done()
    options = HTTPOptions(
        compress=table.boolean("compress"),
        h2_backend=table.boolean("h2_backend"),
        idle_timeout=table.integer("idle_timeout", low=1),
        headers_read_timeout=table.integer("headers_read_timeout", low=1),
        response=response,
        replay_cache=caches or None,
    )
    table.done()
    return options


def _tls_options(table: Table | None) -> TLSOptions | None:
    if table is None:
        return None
    options = TLSOptions(
        alpn=table.strings("alpn"),
        versions=table.strings("versions"),
        default_self_signed=table.boolean("default_self_signed"),
    )
    for name in options.alpn or []:
        if not is_alpn(name):
            table.error("alpn", f"{name!r} {NOT_ALPN}")
    unknown = [version for version in options.versions or [] if version not in TLS_VERSIONS]
    if unknown:
        table.document.warn(table.field("versions"), f"{unknown[0]} is not offered; {' and '.join(TLS_VERSIONS)} are")
    table.done()
    return options


def _service_check(table: Table, *, kind: str) -> Check:
    """Durations outside 1 s to 60 s are clamped with a warning, as the original's client does."""
    check = _check(
        table,
        kind=kind,
        port=table.port("port"),
        interval=_clamped(table, "interval"),
        timeout=_clamped(table, "timeout"),
    )
    table.done()
    return check


def _check(table: Table, *, kind: str, port: int | None, interval: float | None, timeout: float | None) -> Check:
    grace = _clamped(table, "grace_period") if table.raw("grace_period")[1] not in (None, "", 0, "0s") else None
    http = kind == "http"
    method, path, protocol = table.string("method"), table.string("path"), table.choice("protocol", ("http", "https"))
    headers = _headers(table)
    skip_verify, server_name = table.boolean("tls_skip_verify"), table.string("tls_server_name")
    return Check(
        type=kind,
        port=port,
        interval=format_go_duration(interval if interval is not None else 15),
        timeout=format_go_duration(timeout if timeout is not None else 2),
        grace_period=format_go_duration(grace) if grace is not None else None,
        method=(method or "GET").upper() if http else None,
        path=(path or "/") if http else None,
        protocol=(protocol or "http") if http else None,
        headers=headers or None,
        tls_skip_verify=skip_verify,
        tls_server_name=server_name,
    )


def _clamped(table: Table, key: str) -> float | None:
    value = table.seconds(key, bare_unit_s=0.001)
    if value is None:
        return None
    clamped = min(max(value, SERVICE_CHECK_S_MIN), SERVICE_CHECK_S_MAX)
    if clamped != value:
        table.document.warn(
            table.field(key), f"{format_go_duration(value)} is outside 1s to 1m; {format_go_duration(clamped)} is used"
        )
    return clamped


def _headers(table: Table) -> list[HTTPHeader]:
    """A map, or a list of `{name, value}`; values may be lists."""
    _, value = table.raw("headers")
    if isinstance(value, dict):
        return [HTTPHeader(name=str(name), values=_header_values(entry)) for name, entry in value.items()]
    if isinstance(value, list):
        entries: list[HTTPHeader] = []
        for inner in table.tables("headers"):
            name = inner.string("name")
            entry = inner.raw("values")[1] if inner.raw("values")[1] is not None else inner.raw("value")[1]
            if not name:
                inner.error("name", "is required")
            else:
                entries.append(HTTPHeader(name=name, values=_header_values(entry)))
        return entries
    if value is not None:
        table.error("headers", "must be a table, or a list of {name, value}")
    return []


def _header_values(value: Any) -> list[str]:
    items: list[Any] = value if isinstance(value, list) else [value]
    return [("true" if item else "false") if isinstance(item, bool) else str(item) for item in items]
