"""The first host's extra part: settings of server and registry, and the call that sets up a control plane."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from pantala.errors import InternalError
from pantala.host.place import LEAVES_PORT, ROUTES_PORT
from pantala.host.settings import Tuning, changed, save
from pantala.kit.files import write_private
from pantala.wire.hosts import JoinRequest
from pantala.wire.server import AddressPools, Bootstrapped, BusSettings, RegistrySettings, ServerSettings

BOOTSTRAP_WITHIN_S = 120


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """One control plane: where it keeps its state, what it is called, where it listens. `api` and `registry` are
    `address:port`; `hubs`: addresses of the hosts that are hubs of the bus; `builder`: socket of buildkitd."""

    state: str
    registry_state: str
    api: str
    registry: str
    bus_url: str
    builder: str
    builder_state: str
    app_domain: str
    platform_domain: str
    regions: list[str]
    hubs: list[str]
    edge_addresses: list[str]
    closed_addresses: list[str]
    shared_kernel: bool = False
    pools: AddressPools = AddressPools()

    @property
    def state_dir(self) -> Path:
        return Path(self.state)

    @property
    def server_settings(self) -> Path:
        return self.state_dir / "server.json"

    @property
    def registry_settings(self) -> Path:
        return self.state_dir / "registry.yml"

    @property
    def requests(self) -> Path:
        """What the hosts that are let in at the start asked with."""
        return self.state_dir / "hosts.json"

    @property
    def registry_name(self) -> str:
        return f"registry.{self.platform_domain}"

    @property
    def api_name(self) -> str:
        return f"api.{self.platform_domain}"

    @property
    def authority(self) -> Path:
        return self.state_dir / "ca" / "ca.pem"


def write_server(platform: Platform, tuning: Tuning) -> Path:
    """Settings of the server, and of bootstrapping before it."""
    settings = ServerSettings(
        listen=platform.api,
        state_dir=platform.state,
        bus=BusSettings(url=platform.bus_url, credentials=str(platform.state_dir / "bus" / "control.creds")),
        app_domain=platform.app_domain,
        platform_domain=platform.platform_domain,
        registry=RegistrySettings(
            name=platform.registry_name,
            url=f"http://{platform.registry}",
            backend=platform.registry,
            folder=platform.registry_state,
        ),
        default_region=platform.regions[0],
        regions=platform.regions,
        api_backend=platform.api,
        bus_hubs=[f"{address}:{LEAVES_PORT}" for address in platform.hubs],
        bus_routes=[f"{address}:{ROUTES_PORT}" for address in platform.hubs],
        edge_addresses=platform.edge_addresses,
        closed_addresses=platform.closed_addresses,
        builder=platform.builder,
        builder_folder=platform.builder_state,
        shared_kernel=platform.shared_kernel,
        pools=platform.pools,
    )
    platform.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = {name: value for name, value in tuning.proxy.items() if name == "buckets"}  # edges and server have the same
    return save(platform.server_settings, changed(settings, store | tuning.server))


def bootstrap(platform: Platform, tuning: Tuning, *, email: str, org: str, hosts: list[JoinRequest]) -> Bootstrapped:
    """The first user, org and token, the control plane's keys, its settings, and these hosts let in; safe to repeat."""
    settings = write_server(platform, tuning)
    write_private(platform.requests, msgspec.json.encode(hosts))
    command = [sys.executable, "-m", "pantala.server.bootstrap", "--settings", str(settings)]
    done = subprocess.run(
        [*command, "--email", email, "--org", org, "--hosts", str(platform.requests)],
        capture_output=True,
        text=True,
        timeout=BOOTSTRAP_WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"the control plane could not be set up: {done.stderr.strip()[-400:]}")
    made = msgspec.json.decode(done.stdout, type=Bootstrapped)
    _write_registry(platform, made)
    return made


def _write_registry(platform: Platform, made: Bootstrapped) -> None:
    """`distribution` behind our token service; deletions are the sweep's."""
    configuration = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": platform.registry_state}, "delete": {"enabled": True}},
        "http": {"addr": platform.registry, "relativeurls": True},
        "auth": {
            "token": {
                "realm": f"https://{platform.api_name}/v2/token",
                "service": made.registry_service,
                "issuer": made.registry_issuer,
                "rootcertbundle": made.registry_bundle,
            }
        },
    }
    platform.registry_settings.write_text(json.dumps(configuration, indent=2))  # JSON is YAML
