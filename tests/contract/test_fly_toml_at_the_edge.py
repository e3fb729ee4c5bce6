"""What a fly.toml says of services reaches the edge: file, machine config, the API's checks, the row that proxies read.

That a proxy does what such a row says is shown in tests/integration/test_proxy_entry.py and its neighbours."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest

from pantala.agent.view import service_row
from pantala.appconfig.machines import machine_config
from pantala.appconfig.parse import parse
from pantala.domain.validate import validate_config
from pantala.wire.machine import MachineConfig

PORTS: dict[str, dict[str, Any]] = {
    "raw TCP": {"port": 7000},
    "raw TCP on a range": {"start_port": 7000, "end_port": 7010},
    "TLS to bytes": {"port": 8883, "handlers": ["tls"], "tls_options": {"alpn": ["mqtt"], "versions": ["TLSv1.3"]}},
    "Postgres": {"port": 5432, "handlers": ["pg_tls"], "tls_options": {"default_self_signed": True}},
    "PROXY protocol, version 1": {"port": 7001, "handlers": ["proxy_proto"]},
    "PROXY protocol, version 2": {
        "port": 7002,
        "handlers": ["tls", "proxy_proto"],
        "proxy_proto_options": {"version": "v2"},
    },
    "HTTP": {"port": 80, "handlers": ["http"], "force_https": True},
    "HTTPS": {
        "port": 443,
        "handlers": ["tls", "http"],
        "tls_options": {"alpn": ["h2", "http/1.1"], "versions": ["TLSv1.2", "TLSv1.3"], "default_self_signed": False},
        "http_options": {
            "compress": True,
            "h2_backend": True,
            "idle_timeout": 30,
            "headers_read_timeout": 5,
            "response": {"headers": {"x-a": "b", "server": False}, "pristine": True},
            "replay_cache": [
                {
                    "path_prefix": "/",
                    "ttl_seconds": 60,
                    "type": "cookie",
                    "name": "session",
                    "allow_bypass": True,
                }
            ],
        },
    },
}


def config(document: dict[str, Any]) -> MachineConfig:
    parsed, findings = parse({"app": "web"} | document, "")
    assert [finding.text("fly.toml") for finding in findings] == []
    made = machine_config(parsed, "app", image="registry.pantala.test/web:v1", metadata={}, read_file=lambda _: b"")
    validate_config(made)
    return made


def row(document: dict[str, Any]) -> dict[str, Any]:
    """As it travels."""
    (service,) = config(document).services or []
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(service_row("web", service)))
    return found


@pytest.mark.parametrize("port", PORTS.values(), ids=PORTS.keys())
def test_each_option_of_a_port_is_in_the_row(port: dict[str, Any]) -> None:
    found = row({"services": [{"internal_port": 8080, "ports": [port]}]})
    (declared,) = found["ports"]
    assert {name: value for name, value in declared.items() if value is not None} == {"handlers": []} | port


def test_options_of_an_http_service_are_those_of_its_ports() -> None:
    options, tls = PORTS["HTTPS"]["http_options"], PORTS["HTTPS"]["tls_options"]
    service = {"internal_port": 8080, "force_https": True, "http_options": options, "tls_options": tls}
    plain, secure = row({"http_service": service})["ports"]
    assert (plain["port"], plain["handlers"], plain["force_https"]) == (80, ["http"], True)
    assert (secure["port"], secure["handlers"]) == (443, ["http", "tls"])
    assert plain["http_options"] == secure["http_options"] == options
    assert secure["tls_options"] == tls


def test_limits_and_sleep_are_in_the_row() -> None:
    text = """
    [http_service]
    internal_port = 9000
    auto_stop_machines = "suspend"
    auto_start_machines = true
    min_machines_running = 2
    [http_service.concurrency]
    type = "requests"
    soft_limit = 7
    hard_limit = 9
    [[http_service.checks]]
    path = "/healthz"
    [[statics]]
    guest_path = "/app/public"
    url_prefix = "/static"
    """
    document = tomllib.loads(text)
    found = row(document)
    assert found["concurrency"] == {"type": "requests", "soft_limit": 7, "hard_limit": 9}
    kept = {name: found[name] for name in ("internal_port", "autostop", "autostart", "min_machines_running", "checked")}
    assert kept == {
        "internal_port": 9000, "autostop": "suspend", "autostart": True, "min_machines_running": 2, "checked": True,
    }  # fmt: skip
    made = config(document)
    (service,) = made.services or []
    assert [one.guest_path for one in service_row("web", service, made.statics or ()).statics] == ["/app/public"]


def test_the_old_name_of_http_is_http() -> None:
    ports = row({"services": [{"internal_port": 8080, "ports": [{"port": 80, "handlers": ["edge_http"]}]}]})["ports"]
    assert ports[0]["handlers"] == ["http"]


@pytest.mark.parametrize(
    ("options", "level", "why"),
    [
        ({"alpn": [""]}, "error", "is no name of a protocol"),
        ({"alpn": ["x" * 256]}, "error", "is no name of a protocol"),
        ({"versions": ["TLSv1.1"]}, "warning", "TLSv1.1 is not offered; TLSv1.2 and TLSv1.3 are"),
    ],
    ids=["empty", "long", "version"],
)
def test_what_tls_does_not_know_is_said(options: dict[str, Any], level: str, why: str) -> None:
    port = {"port": 443, "handlers": ["tls"], "tls_options": options}
    _, findings = parse({"services": [{"internal_port": 8080, "ports": [port]}]}, "")
    assert [(finding.level, why in finding.text("fly.toml")) for finding in findings] == [(level, True)]
