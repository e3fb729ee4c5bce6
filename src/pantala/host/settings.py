"""Writes what the processes of one host are started with, from what control gave it and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pantala.agent.settings import AgentSettings, read_path
from pantala.agent.settings import save as save_agent_settings
from pantala.errors import InvalidRequest
from pantala.host import bus
from pantala.host.place import ADMIN_PORT, Place
from pantala.kit.files import write_private
from pantala.net.rules import ENTRY_PORT
from pantala.wire.feed import BucketSettings, DNSSettings, Listener, MeshSettings, ProxySettings
from pantala.wire.hosts import Joined
from pantala.wire.server import BusSettings

API_INSIDE = "fdaa::3"
"""Where machines find DNS and the API, on every host."""
API_PORT = 4280

S = TypeVar("S", bound=msgspec.Struct)


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator (or a test that has no time) may set differently; the same for all hosts of a box. `agent`,
    `proxy`, `mesh` and `server` hold fields of their settings. `drain_max_ms`: how long a proxy that ends waits for
    long-lived connections."""

    idle_window_s: float = 60.0
    drain_max_ms: int = 3_600_000
    resolvers: list[str] = []
    agent: dict[str, Any] = {}
    proxy: dict[str, Any] = {}
    mesh: dict[str, Any] = {}
    server: dict[str, Any] = {}


def write_bus(place: Place, joined: Joined) -> Path:
    write_private(place.bus_settings, bus.configuration(place, joined).encode())
    return place.bus_settings


def write_agent(place: Place, joined: Joined, tuning: Tuning) -> Path:
    edge_key = place.identity("edge.key")
    settings = AgentSettings(
        node=joined.node,
        region=joined.region,
        zone=joined.zone,
        epoch=joined.epoch,
        address=place.address,
        state_dir=place.state_dir,
        run_dir=place.run_dir,
        bus=BusSettings(url=place.bus_url, credentials=str(place.identity("bus.creds")), inbox=joined.node),
        proxy_socket=place.feed_socket,
        mesh=place.mesh,
        node_key=place.key("sealing.key"),
        signing_key=place.key("signing.key"),
        cgroup_root=place.cgroup_root,
        registries=joined.registries,
        idle_window_s=tuning.idle_window_s,
        trusted_keys={"control": joined.control_key},
        edge_key=edge_key if edge_key.exists() else None,
        closed_addresses=joined.closed_addresses,
        entrances=True,
        edge_addresses=place.listen,
    )
    save_agent_settings(changed(settings, place.agent | tuning.agent), place.agent_settings)
    return place.agent_settings


def write_proxy(place: Place, joined: Joined, tuning: Tuning) -> Path:
    """A host that is no edge has no public listener: its proxy serves the mesh, and machines with DNS and Flycast."""
    shared = joined.edge_addresses[0] if joined.edge_addresses else (place.listen or [""])[0]
    mesh = MeshSettings(
        listen=place.mesh,
        certificate=str(place.identity("node.pem")),
        key=str(place.key("node.key")),
        authority=str(place.identity("authority.pem")),
    )
    settings = ProxySettings(
        node=joined.node,
        region=joined.region,
        state_dir=str(place.state_dir / "proxy"),
        agent_socket=str(place.feed_socket),
        listeners=[
            Listener(address=address, port=port, tls=port == 443) for address in place.listen for port in (80, 443)
        ],
        entry_listen=[f"127.0.0.1:{ENTRY_PORT}", f"[::1]:{ENTRY_PORT}"],
        dns=DNSSettings(
            listen=[API_INSIDE],
            public_listen=place.listen,
            public_names={joined.app_domain: shared, joined.platform_domain: shared} if shared else {},
            forward=tuning.resolvers,
        ),
        mesh=changed(mesh, tuning.mesh),
        drain_max_ms=tuning.drain_max_ms,
        api_forward=joined.api_backend,
        api_listen=[f"[{API_INSIDE}]:{API_PORT}"],
        admin_listen=f"{place.address}:{ADMIN_PORT}",
        app_domain=joined.app_domain,
    )
    (place.state_dir / "proxy").mkdir(exist_ok=True, mode=0o700)
    return save(place.proxy_settings, changed(settings, tuning.proxy))


def read_buckets(path: Path | None) -> dict[str, Any]:
    """Fields of the proxy's settings by which it reads files of apps from buckets; the server takes them over from
    there. Raises InvalidRequest."""
    if path is None:
        return {}
    try:
        text = path.read_bytes()
        found = msgspec.json.decode(text, type=BucketSettings)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field="--buckets") from error
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{path}: {error}", field="--buckets") from error
    for name in msgspec.json.decode(text, type=dict[str, Any]):
        if name not in BucketSettings.__struct_fields__:
            known = ", ".join(BucketSettings.__struct_fields__)
            raise InvalidRequest(f"{path}: there is no {name}; there are {known}", field="--buckets")
    for name in (found.ca_file, found.credentials_file):
        if name and not (Path(name).is_absolute() and Path(name).is_file()):
            raise InvalidRequest(f"{path} names {name}, which is no absolute path of a file here", field="--buckets")
    return {"buckets": msgspec.to_builtins(found)}


def promised(cpus: int | None, memory_mib: int | None) -> dict[str, int]:
    """Fields of the agent's settings that say what its machines may be promised; else what the host has."""
    return {name: value for name, value in (("cpus", cpus), ("memory_mib", memory_mib)) if value is not None}


def changed(settings: S, fields: dict[str, Any]) -> S:
    """With these fields instead. Raises InvalidRequest for one that is not there or of another type."""
    known = type(settings).__struct_fields__
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"{type(settings).__name__} has no {name}", field="--settings")
    document = msgspec.to_builtins(settings, enc_hook=str) | fields
    try:
        return msgspec.convert(document, type(settings), dec_hook=read_path)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{type(settings).__name__}: {error}", field="--settings") from error


def save(path: Path, settings: msgspec.Struct) -> Path:
    write_private(path, msgspec.json.format(msgspec.json.encode(settings), indent=2))
    return path
