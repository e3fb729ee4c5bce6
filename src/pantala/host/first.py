"""`pantala host init`: a control plane on this server, which is its first host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pantala.cli.context import Config, save_config
from pantala.errors import InternalError
from pantala.host.builds import Builds
from pantala.host.control import Platform, bootstrap
from pantala.host.identity import join_request, keep
from pantala.host.outside import hub_answers, resolvers
from pantala.host.place import Place
from pantala.host.record import BUILDS_NETNS, FirstHost, HostRecord
from pantala.host.settings import API_PORT, Tuning
from pantala.wire.server import AddressPools, Bootstrapped

REGISTRY_PORT = 5000


def set_up(
    root: Path,
    place: Place,
    *,
    region: str,
    zone: str,
    domain: str,
    email: str,
    org: str,
    systemd: bool,
    server: dict[str, Any] | None = None,
    proxy: dict[str, Any] | None = None,
    agent: dict[str, Any] | None = None,
) -> tuple[HostRecord, Bootstrapped]:
    """The control plane's database and keys, and this host admitted to it; nothing is started.
    `server`, `proxy` and `agent`: fields of their settings that the operator chose."""
    platform = Platform(
        state=str(root / "control"),
        registry_state=str(root / "registry"),
        api=f"{place.address}:{API_PORT}",
        registry=f"{place.address}:{REGISTRY_PORT}",
        bus_url=place.bus_url,
        builder=str(place.run_dir / "buildkitd.sock"),
        builder_state=str(root / "buildkit"),
        app_domain=f"apps.{domain}",
        platform_domain=domain,
        regions=[region],
        hubs=[place.address],
        edge_addresses=[place.address],
        closed_addresses=[f"{place.address}/32"],
        pools=AddressPools(shared_v4=[place.address]),
    )
    builds = Builds(netns=BUILDS_NETNS, open=[platform.api, platform.registry], closed=platform.closed_addresses)
    tuning = Tuning(resolvers=resolvers(loopback=True), server=server or {}, proxy=proxy or {}, agent=agent or {})
    first = FirstHost(
        platform=platform,
        builds=builds,
        mirrored=[] if hub_answers() else ["docker.io"],
    )
    request = join_request(place, region=region, node=f"{region}-1", zone=zone)
    made = bootstrap(platform, tuning, email=email, org=org, hosts=[request])
    if not made.hosts:
        raise InternalError("the control plane admitted no host")
    keep(place, made.hosts[0])
    return HostRecord(root=str(root), place=place, tuning=tuning, systemd=systemd, first=first), made


def log_in(record: HostRecord, made: Bootstrapped) -> None:
    """The user who runs this becomes the platform's first."""
    assert record.first is not None
    platform = record.first.platform
    save_config(
        Config(
            api_url=f"http://{platform.api}",
            token=made.token,
            org=made.org,
            app_domain=platform.app_domain,
            edge=record.place.address,
            ca_file=made.ca,
        )
    )
