"""Where everything of a box is: names, addresses and paths. Pure; `network.py` and `processes.py` make them real.

    100.96.0.0/30     this machine ⇄ router          100.96.<100+i>.0/30  router ⇄ client of region i
    100.96.<i>.0/30   router ⇄ host i                100.96.200.0/30      router ⇄ builds
    100.96.255.1      the edge address, on every host, reached through the router

The router has the first address of each link, what is behind it the second. Several boxes can run side by side: the
variable PANTALA_BOX_INSTANCE (0 to 9) chooses other names and another second number of all addresses.
"""

from __future__ import annotations

import os
from pathlib import Path

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
ROUTER = f"{PREFIX}router"
BUILDS = f"{PREFIX}builds"
UPLINK = f"{PREFIX}uplink"
TABLE = f"pantala_box{SUFFIX}"


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
    def router_device(self) -> str:
        return f"to-{self.third}"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One host of the box; `node` is its id."""

    node: str
    region: str
    link: Link


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """A box as `up` decides it and keeps in `<state>/box.json`. `tuning`: see `pantala.box.places.tuned`."""

    id: str
    state: str
    run: str
    cache: str
    regions: list[str]
    idle_window_s: float
    tuning: dict[str, str] = {}
    created_run_netns: bool = False
    forwarding_before: str = "1"

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
        return [*(host.link for host in self.hosts()), *self.clients(), self.builds()]

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
    *, state: Path, run: Path, cache: Path, regions: list[str], idle_window_s: float, tuning: dict[str, str]
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
    )


def load_box(state: Path) -> Box | None:
    try:
        return msgspec.json.decode((state / "box.json").read_bytes(), type=Box)
    except FileNotFoundError:
        return None
