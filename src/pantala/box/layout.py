"""Where everything of a box is: names, addresses and paths. Pure; `network.py` and `processes.py` make them real.

    100.96.0.0/30     this machine ⇄ router          100.96.<100+i>.0/30  router ⇄ client of region i
    100.96.<i>.0/30   router ⇄ host i                100.96.200.0/30      router ⇄ builds
    100.96.255.1      the edge address, on every host; the router sends a client to the nearest host that announces it
    100.96.254.0/24   addresses that apps have for themselves; led like the edge address
    fd96:0:0:<third>::/64   the same links by IPv6: what 6PN travels on from host to host
    100.96.254.0/24, fd96:0:1::/64   pools: addresses of single apps, routed like the edge address

The router has the first address of each link, what is behind it the second. Several boxes can run side by side: the
variable PANTALA_BOX_INSTANCE (0 to 9) chooses other names and another second number of all addresses.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from pantala.errors import InvalidRequest
from pantala.kit.ids import ulid

INSTANCE = int(os.environ.get("PANTALA_BOX_INSTANCE", "0")) % 10
SUFFIX = str(INSTANCE) if INSTANCE else ""
SUBNET = f"100.{96 + INSTANCE}"
EDGE_ADDRESS = f"{SUBNET}.255.1"
PREFIX = f"pnt{SUFFIX}-"
CGROUP = f"pantala{SUFFIX}"
RUN_NAME = f"pantala/box{SUFFIX}"
APP_DOMAIN = "apps.pantala.test"
PLATFORM_DOMAIN = "pantala.test"
API_NAME = f"api.{PLATFORM_DOMAIN}"
REGISTRY_NAME = f"registry.{PLATFORM_DOMAIN}"
API_PORT, REGISTRY_PORT, BUS_PORT = 4280, 5000, 4222
HOSTS_MAX = 35
LINKS_MAX = 99
"""Hosts, with those that join later."""
ROUTER = f"{PREFIX}router"
BUILDS = f"{PREFIX}builds"
UPLINK = f"{PREFIX}uplink"
TABLE = f"pantala_box{SUFFIX}"
SUBNET6 = f"fd96:{INSTANCE:x}:0"
EVERYTHING6 = f"fd96:{INSTANCE:x}::/32"
POOL = f"{SUBNET}.254.0/24"
PUBLIC = (f"{EDGE_ADDRESS}/32", POOL)
"""What every edge announces by IPv4."""
POOL6 = f"fd96:{INSTANCE:x}:1::/64"
WIREGUARD_PORT = 51820
LinkKind = Literal["plain", "wireguard"]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One namespace behind the router. `third`: the third number of its addresses."""

    netns: str
    third: int

    @property
    def gateway(self) -> str:
        return f"{SUBNET}.{self.third}.1"

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.third}.2"

    @property
    def gateway6(self) -> str:
        return f"{SUBNET6}:{self.third:x}::1"

    @property
    def address6(self) -> str:
        return f"{SUBNET6}:{self.third:x}::2"

    @property
    def router_device(self) -> str:
        return f"to-{self.third}"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One host of the box; `node` is its id. `edge`: it takes public traffic."""

    node: str
    region: str
    link: Link
    edge: bool = True

    @property
    def wireguard_device(self) -> str:
        """Its socket is named after it in a folder that all hosts of this machine share."""
        return f"wgp{SUFFIX}-{self.link.third}"

    @property
    def wireguard_endpoint(self) -> str:
        return f"{self.link.address}:{WIREGUARD_PORT}"


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """A box as `up` decides it and keeps in `<state>/box.json`. `tuning`: see `pantala.box.places.tuned`. `attached`:
    hosts that joined later (`add_link`), which the box connects and does not run. `links_kind`: how hosts carry 6PN to
    one another. `distances`: packets between regions take as long as on Earth. `bfd_ms`: how often router and edges
    greet each other, 0 means by the number of hosts."""

    id: str
    state: str
    run: str
    cache: str
    regions: list[str]
    idle_window_s: float
    tuning: dict[str, str] = {}
    created_run_netns: bool = False
    links_kind: LinkKind = "plain"
    distances: bool = False
    bfd_ms: int = 0
    attached: list[Host] = []

    @property
    def state_dir(self) -> Path:
        return Path(self.state)

    @property
    def run_dir(self) -> Path:
        return Path(self.run)

    @property
    def cache_dir(self) -> Path:
        return Path(self.cache)

    @property
    def builds_dir(self) -> Path:
        return self.cache_dir / f"buildkit{SUFFIX}"

    def hosts(self) -> list[Host]:
        return [
            Host(node=f"{region}-1", region=region, link=Link(netns=f"{PREFIX}{region}-1", third=index))
            for index, region in enumerate(self.regions, start=1)
        ]

    def all_hosts(self) -> list[Host]:
        """Also those that joined later."""
        return [*self.hosts(), *self.attached]

    def edges(self) -> list[Host]:
        return [host for host in self.all_hosts() if host.edge]

    @property
    def pool6(self) -> str | None:
        """None where hosts have no IPv6 between them but tunnels."""
        return POOL6 if self.links_kind == "plain" else None

    @property
    def bfd_interval_ms(self) -> int:
        """A dead edge is left after three of them; two cores hold 35 edges only with long ones."""
        return self.bfd_ms or (50 if len(self.regions) <= 5 else 100 if len(self.regions) <= 12 else 300)

    @property
    def health_interval_ms(self) -> int:
        """How often an edge's own BIRD is told whether its proxy answers."""
        return 2 * self.bfd_interval_ms

    @property
    def lame_duck_ms(self) -> int:
        """How long a proxy that leaves still accepts: until the router has heard that it is not an edge any more."""
        return 3 * self.health_interval_ms + 200

    def control(self) -> Host:
        """The host that the server, the registry and the bus hub run on."""
        return self.hosts()[0]

    def clients(self) -> list[Link]:
        return [
            Link(netns=f"{PREFIX}at-{region}", third=100 + index) for index, region in enumerate(self.regions, start=1)
        ]

    def client_at(self, region: str) -> Link:
        if region not in self.regions:
            raise InvalidRequest(f"this box has no region {region}; it has {', '.join(self.regions)}", field="region")
        return self.clients()[self.regions.index(region)]

    def builds(self) -> Link:
        return Link(netns=BUILDS, third=200)

    def links(self) -> list[Link]:
        return [*(host.link for host in self.all_hosts()), *self.clients(), self.builds()]

    def region_of(self, link: Link) -> str | None:
        """None for links that are nowhere: builds."""
        for host in self.all_hosts():
            if host.link == link:
                return host.region
        clients = self.clients()
        return self.regions[clients.index(link)] if link in clients else None

    def namespaces(self) -> list[str]:
        return [ROUTER, *(link.netns for link in self.links())]

    @property
    def api_url(self) -> str:
        return f"http://{self.control().link.address}:{API_PORT}"

    @property
    def registry(self) -> str:
        return f"{self.control().link.address}:{REGISTRY_PORT}"

    @property
    def bus_url(self) -> str:
        return f"nats://{self.control().link.address}:{BUS_PORT}"

    @property
    def ca_file(self) -> Path:
        return self.state_dir / "control" / "ca" / "ca.pem"

    def logs_dir(self) -> Path:
        return self.state_dir / "logs"

    def record(self) -> Path:
        return self.state_dir / "box.json"


def new_box(
    *,
    state: Path,
    run: Path,
    cache: Path,
    regions: list[str],
    idle_window_s: float,
    tuning: dict[str, str],
    links_kind: LinkKind = "plain",
    distances: bool = False,
    bfd_ms: int = 0,
) -> Box:
    """Raises InvalidRequest for regions that cannot be."""
    if not regions or len(regions) > HOSTS_MAX or len(set(regions)) != len(regions):
        raise InvalidRequest("must be one to 35 different region codes", field="--regions")
    for region in regions:
        if not (len(region) == 3 and region.isalpha() and region.islower()):
            raise InvalidRequest(f"{region!r} is not a region code such as iad", field="--regions")
    return Box(
        id=ulid().lower(),
        state=str(state.resolve()),
        run=str(run),
        cache=str(cache.resolve()),
        regions=regions,
        idle_window_s=idle_window_s,
        tuning=tuning,
        links_kind=links_kind,
        distances=distances,
        bfd_ms=bfd_ms,
    )


def load_box(state: Path) -> Box | None:
    try:
        return msgspec.json.decode((state / "box.json").read_bytes(), type=Box)
    except FileNotFoundError:
        return None
