"""Rules of a machine config that types alone cannot say. Raises InvalidRequest naming the field."""

from __future__ import annotations

from pantala.errors import InvalidRequest
from pantala.wire.machine import MachineConfig


def validate_config(config: MachineConfig) -> None:
    if not config.image:
        raise InvalidRequest("is required", field="config.image", hint="name an image such as registry.example/app:tag")
    if config.guest is not None and config.size is not None:
        raise InvalidRequest("cannot be given together with config.guest", field="config.size")
    for index, service in enumerate(config.services or []):
        _port(service.internal_port, f"config.services[{index}].internal_port")
        for at, port in enumerate(service.ports or []):
            _port(port.port, f"config.services[{index}].ports[{at}].port")


def _port(value: int | None, field: str) -> None:
    if value is not None and not 1 <= value <= 65535:
        raise InvalidRequest(f"{value} is not a port; ports are 1 to 65535", field=field)
