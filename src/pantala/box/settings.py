"""Writes what each process of a box is started with: settings, keys, the registry's and the bus's configuration."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import msgspec

from pantala.agent.identity import Identity
from pantala.agent.settings import AgentSettings
from pantala.agent.settings import save as save_agent_settings
from pantala.box.layout import (
    API_NAME,
    API_PORT,
    APP_DOMAIN,
    BUS_PORT,
    CGROUP,
    EDGE_ADDRESS,
    PLATFORM_DOMAIN,
    REGISTRY_NAME,
    REGISTRY_PORT,
    SUBNET,
    Box,
    Host,
)
from pantala.box.network import resolvers
from pantala.kit.files import write_private
from pantala.kit.nkeys import NKey
from pantala.kit.sealing import Opener, Signer, ensure_key
from pantala.wire.feed import DNSSettings, Listener, ProxySettings
from pantala.wire.hosts import Joined, JoinRequest, Renewed
from pantala.wire.server import Bootstrapped, BusSettings, RegistrySettings, ServerSettings

API_INSIDE = "fdaa::3"
"""Where machines find DNS and the API, on every host."""


class HostFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of one host's state, run and settings."""

    state: Path
    run: Path
    agent_settings: Path
    proxy_settings: Path
    feed_socket: Path


def host_files(box: Box, host: Host) -> HostFiles:
    state, run = box.state_dir / "hosts" / host.node, box.run_dir / host.node
    return HostFiles(
        state=state,
        run=run,
        agent_settings=state / "agent.json",
        proxy_settings=state / "proxy.json",
        feed_socket=run / "proxy.sock",
    )


def make_folders(box: Box) -> None:
    for folder in (box.state_dir / "control", box.state_dir / "keys", box.logs_dir(), box.run_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for host in box.hosts():
        files = host_files(box, host)
        for folder in (files.state, files.run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def bus_password(box: Box) -> str:
    path = box.state_dir / "keys" / "bus.password"
    if not path.is_file():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(16))
    return path.read_text()


def write_join_requests(box: Box) -> Path:
    """What the box's hosts ask to be let in with; their keys are made on the first call and kept."""
    requests = [_join_request(box, host) for host in box.hosts()]
    path = box.state_dir / "control" / "hosts.json"
    path.write_bytes(msgspec.json.encode(requests))
    return path


def _join_request(box: Box, host: Host) -> JoinRequest:
    state = host_files(box, host).state
    keys = state / "keys"
    return JoinRequest(
        node=host.node,
        region=host.region,
        address=host.link.address,
        verify_key=Signer(ensure_key(keys / "signing.key")).verify_key,
        sealing_key=Opener(ensure_key(keys / "sealing.key")).public_key,
        csr_pem=Identity(state / "identity", keys).request(),
        bus_key=NKey.ensure("user", keys / "bus.seed").public,
    )


def write_identity(box: Box, host: Host, joined: Joined) -> None:
    """What control gave the host, where its agent looks for it."""
    state = host_files(box, host).state
    Identity(state / "identity", state / "keys").keep(
        Renewed(
            certificate_pem=joined.certificate_pem,
            authority_pem=joined.authority_pem,
            user_jwt=joined.bus.user_jwt,
        )
    )
    sealing = Opener(ensure_key(state / "keys" / "sealing.key"))
    write_private(state / "identity" / "edge.key", sealing.open(joined.edge_key_sealed))


def write_bus(box: Box) -> Path:
    """One nats-server on the control host; more hosts join as leaves when there are more hosts."""
    path = box.state_dir / "control" / "nats.conf"
    path.touch(mode=0o600)
    path.write_text(
        f'server_name: "{box.control().node}"\n'
        f'listen: "{box.control().link.address}:{BUS_PORT}"\n'
        "max_payload: 8MB\n"
        f'authorization {{ user: "pantala", password: "{bus_password(box)}" }}\n'
    )
    return path


def write_server(box: Box) -> Path:
    control = box.control().link.address
    settings = ServerSettings(
        listen=f"{control}:{API_PORT}",
        state_dir=str(box.state_dir / "control"),
        bus=BusSettings(url=box.bus_url, user="pantala", password=bus_password(box)),
        app_domain=APP_DOMAIN,
        platform_domain=PLATFORM_DOMAIN,
        registry=RegistrySettings(
            name=REGISTRY_NAME,
            url=f"http://{box.registry}",
            backend=box.registry,
            folder=str(box.state_dir / "registry"),
        ),
        default_region=box.regions[0],
        regions=box.regions,
        closed_addresses=[f"{SUBNET}.0.0/16"],
        api_backend=f"{control}:{API_PORT}",
        builder=str(box.run_dir / "buildkitd.sock"),
        builder_folder=str(box.builds_dir),
        shared_kernel=True,
    )
    return _write(box.state_dir / "control" / "server.json", settings)


def write_registry(box: Box, made: Bootstrapped) -> Path:
    """`distribution` behind our token service; deletions are the sweep's."""
    configuration = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(box.state_dir / "registry")}, "delete": {"enabled": True}},
        "http": {"addr": f"{box.control().link.address}:{REGISTRY_PORT}", "relativeurls": True},
        "auth": {
            "token": {
                "realm": f"https://{API_NAME}/v2/token",
                "service": made.registry_service,
                "issuer": made.registry_issuer,
                "rootcertbundle": made.registry_bundle,
            }
        },
    }
    path = box.state_dir / "control" / "registry.yml"
    path.write_text(json.dumps(configuration, indent=2))  # JSON is YAML
    return path


def write_agent(box: Box, host: Host, made: Bootstrapped) -> Path:
    files = host_files(box, host)
    joined = next(joined for joined in made.hosts if joined.node == host.node)
    write_identity(box, host, joined)
    settings = AgentSettings(
        node=joined.node,
        region=joined.region,
        zone=joined.zone,
        epoch=joined.epoch,
        address=host.link.address,
        state_dir=files.state,
        run_dir=files.run,
        bus=BusSettings(url=box.bus_url, user="pantala", password=bus_password(box)),
        proxy_socket=files.feed_socket,
        node_key=files.state / "keys" / "sealing.key",
        signing_key=files.state / "keys" / "signing.key",
        cgroup_root=f"{CGROUP}/{host.node}",
        registries=joined.registries,
        idle_window_s=box.idle_window_s,
        trusted_keys={"control": joined.control_key},
        edge_key=files.state / "identity" / "edge.key",
        closed_addresses=joined.closed_addresses,
    )
    save_agent_settings(settings, files.agent_settings)
    return files.agent_settings


def write_proxy(box: Box, host: Host) -> Path:
    files = host_files(box, host)
    control = box.control().link.address
    settings = ProxySettings(
        node=host.node,
        region=host.region,
        state_dir=str(files.state / "proxy"),
        agent_socket=str(files.feed_socket),
        listeners=[
            Listener(address=EDGE_ADDRESS, port=80, tls=False),
            Listener(address=EDGE_ADDRESS, port=443, tls=True),
        ],
        dns=DNSSettings(
            listen=[API_INSIDE],
            public_listen=[EDGE_ADDRESS],
            public_names={APP_DOMAIN: EDGE_ADDRESS, PLATFORM_DOMAIN: EDGE_ADDRESS},
            forward=resolvers(),
        ),
        drain_max_ms=5_000,  # `down` does not wait for long-lived connections
        api_forward=f"{control}:{API_PORT}",
        api_listen=[f"[{API_INSIDE}]:{API_PORT}"],
        admin_listen=f"{host.link.address}:9180",
        app_domain=APP_DOMAIN,
    )
    (files.state / "proxy").mkdir(exist_ok=True, mode=0o700)
    return _write(files.proxy_settings, settings)


def _write(path: Path, settings: msgspec.Struct) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(settings), indent=2))
    return path
