"""The parts that the agent composes, found by name when it starts, so that it knows none of them at import.

A known name or `module:attribute` leads to a factory that takes the settings and the clock.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pantala.agent.ports import ImageStore, Network
from pantala.agent.settings import AgentSettings
from pantala.drivers.protocol import Driver
from pantala.errors import InvalidRequest
from pantala.kit import binaries
from pantala.kit.clock import Clock
from pantala.kit.sealing import Opener, b64, ensure_key
from pantala.net import Entrances, PeerLinks

Factory = Callable[[AgentSettings, Clock], Any]


def driver(settings: AgentSettings, clock: Clock) -> Driver:
    return _factory(settings.driver, "driver", {"container": _container})(settings, clock)


def network(settings: AgentSettings, clock: Clock) -> Network:
    return _factory(settings.network, "network", {"host": _host_network})(settings, clock)


def peer_links(settings: AgentSettings) -> PeerLinks | None:
    """The ways to other hosts; None where there are none."""
    if settings.links == "none":
        return None
    if not settings.link_device:
        raise InvalidRequest("must name the device that leads to the other hosts", field="link_device")
    key = ensure_key(wireguard_key_file(settings)) if settings.links == "wireguard" else b""
    return PeerLinks(
        kind=settings.links,
        device=settings.link_device,
        via=settings.link_via,
        private_key=b64(key),
        port=settings.wireguard_port,
    )


def entrances(settings: AgentSettings) -> Entrances | None:
    """What leads connections to the proxy; None where its own sockets are all there is."""
    return Entrances() if settings.entrances else None


def wireguard_key_file(settings: AgentSettings) -> Path:
    return settings.state_dir / "keys" / "wireguard"


def wireguard_row(settings: AgentSettings) -> tuple[str, str]:
    """Public key and endpoint for the node's row; both empty where hosts use plain links."""
    if settings.links != "wireguard":
        return "", ""
    endpoint = settings.wireguard_endpoint
    if endpoint is None:
        endpoint = f"{settings.address}:{settings.wireguard_port}"
    return Opener(ensure_key(wireguard_key_file(settings))).public_key, endpoint


def images(settings: AgentSettings, clock: Clock) -> ImageStore:
    return _factory(settings.images, "images", {"store": _image_store})(settings, clock)


def _factory(name: str, field: str, known: dict[str, Factory]) -> Factory:
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InvalidRequest(f"{name!r} is not one of {', '.join(known)}, nor module:attribute", field=field)
    return _attribute(module, attribute, field)


def _attribute(module: str, attribute: str, field: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidRequest(f"{module}:{attribute} cannot be loaded: {error}", field=field) from error


def _container(settings: AgentSettings, clock: Clock) -> Driver:
    made = _attribute("pantala.drivers.container.driver", "ContainerDriver", "driver")
    return made(
        state_dir=settings.state_dir / "machines",
        run_dir=settings.run_dir / "machines",
        cgroup_root=settings.cgroup_root,
        init=binaries.find("pantala-init"),
        clock=clock,
    )


def _host_network(settings: AgentSettings, clock: Clock) -> Network:
    del clock
    made = _attribute("pantala.net.host", "HostNetwork", "network")
    return made(
        run_dir=settings.run_dir / "net",
        init=binaries.find("pantala-init"),
        allow_private_ranges=settings.allow_private_ranges,
        closed=settings.closed_addresses,
    )


def _image_store(settings: AgentSettings, clock: Clock) -> ImageStore:
    """`pantala.images:open_store(state_dir, registries, limits)`."""
    del clock
    made = _attribute("pantala.images", "open_store", "images")
    return made(state_dir=settings.state_dir / "images", registries=settings.registries, limits=settings.image_limits)
