"""Which of a machine's ports owe an answer over HTTP before a deploy takes the version for good.

The agent asks them once per version (`agent/health.py`), a deploy waits for the answer (`deploys/health.py`).
"""

from __future__ import annotations

from pantala.wire.machine import MachineConfig, Service


def asked_ports(config: MachineConfig) -> list[int]:
    """Ports of services that speak HTTP/1 to the app and have no checks: what accepts there may still never answer."""
    asked = [service.internal_port or 0 for service in config.services or [] if _is_asked(service)]
    return list(dict.fromkeys(asked))


def _is_asked(service: Service) -> bool:
    http = [port for port in service.ports or [] if "http" in (port.handlers or [])]
    h2 = any(port.http_options and port.http_options.h2_backend for port in http)
    return bool(http) and not h2 and not service.checks
