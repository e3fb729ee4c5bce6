"""Who gets to which edge: BIRD in the router and on every edge, and what tells an edge's BIRD that its proxy lives.

Each edge announces the one shared address and the pools by BGP; BFD greets every few milliseconds, so that a dead host
is left at once. The router's BIRD keeps a table of edges per region, the nearest first, and writes each into the kernel
table that the region's clients are routed by (`router.py`). The processes returned here have configurations and control
sockets of their own, in the box's run directory and namespaces; a BIRD of this machine is not touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pantala.box.announcer import PROTOCOL, Bird
from pantala.box.distances import nearest_first
from pantala.box.layout import POOL6, PUBLIC, ROUTER, Box, Host
from pantala.box.router import Cuts, host_table, region_table, regions_of
from pantala.errors import InternalError, InvalidRequest
from pantala.host.supervisor import Process
from pantala.kit import binaries

ROUTER_AS, EDGE_AS = 64512, 64600
ADMIN_PORT = 9180
BFD_MULTIPLIER = 3
KERNEL_MAIN = 254
ANNOUNCED4 = f"[ {', '.join(PUBLIC)} ]"
NEAREST = 200
"""BIRD's preference for the nearest edge; the next one has one less."""


def plan_routing(box: Box) -> list[Process]:
    """Writes their configurations and says how to start them, after the proxies. None for a single host: there is
    nothing to choose, and the router has a plain route."""
    if len(box.all_hosts()) == 1:
        return []
    processes = [_bird(box, "bird-router", ROUTER, write_router(box, Cuts()))]
    for host in box.edges():
        processes += plan_edge(box, host)
    return processes


def plan_edge(box: Box, host: Host) -> list[Process]:
    """What announces one edge, also one that the box does not run itself (`add_link`). The announcer ends before the
    proxy does, so that the edge is left first."""
    after = [f"bird-{host.node}", *([f"proxy-{host.node}"] if host in box.hosts() else [])]
    name = f"bird-{host.node}"
    health = f"http://{host.link.address}:{ADMIN_PORT}/healthz"
    announcer = [sys.executable, "-S", "-E", str(Path(__file__).with_name("announcer.py")), health]
    return [
        _bird(box, name, host.link.netns, write_edge(box, host)),
        Process(
            name=f"announcer-{host.node}",
            command=[*announcer, str(socket_of(box, name)), str(box.health_interval_ms)],
            netns=host.link.netns,
            env={},
            log=str(box.logs_dir() / f"announcer-{host.node}.log"),
            after=after,
        ),
    ]


def reconfigure(box: Box, cuts: Cuts) -> None:
    """Tell the router's BIRD about edges that came, left or were cut off. Nothing where none runs."""
    socket = socket_of(box, "bird-router")
    if not socket.exists():
        return
    write_router(box, cuts)
    try:
        said = Bird(str(socket)).tell("configure")
    except OSError as error:
        raise InternalError(f"the router's BIRD does not answer on {socket}: {error}") from error
    if "Reconfig" not in said:
        raise InternalError(f"the router's BIRD refused its configuration: {said.strip()[-300:]}")


def socket_of(box: Box, name: str) -> Path:
    return box.run_dir / f"{name}.ctl"


def write_router(box: Box, cuts: Cuts) -> Path:
    return _write(box, "bird-router", router_configuration(box, cuts))


def write_edge(box: Box, host: Host) -> Path:
    return _write(box, f"bird-{host.node}", edge_configuration(box, host))


def _bird(box: Box, name: str, netns: str, configuration: Path) -> Process:
    try:
        program = binaries.find("bird")
    except InternalError as error:
        raise InvalidRequest("bird is not installed", hint="apt-get install bird2, or scripts/install") from error
    socket = socket_of(box, name)
    return Process(
        name=name,
        command=[str(program), "-f", "-c", str(configuration), "-s", str(socket)],
        netns=netns,
        env={},
        log=str(box.logs_dir() / f"{name}.log"),
        ready=f"unix:{socket}",
    )


def _write(box: Box, name: str, text: str) -> Path:
    path = box.run_dir / f"{name}.conf"
    path.write_text(text)
    return path


# -- configurations: pure ----------------------------------------------------------------------------------------------


def edge_configuration(box: Box, host: Host) -> str:
    """One static route, off until the announcer turns it on; nothing is written into the host's own tables."""
    routes = "\n".join(f"  route {net} blackhole;" for net in PUBLIC)
    static6 = session6 = ""
    if box.pool6:
        static6 = f"protocol static {PROTOCOL}6 {{ disabled; ipv6; route {box.pool6} blackhole; }}"
        hop6 = f"next hop address {host.link.address6}"
        session6 = f'  ipv6 {{ import none; export where proto = "{PROTOCOL}6"; {hop6}; }};'
    return f"""{_head(host.link.address)}
{_bfd(box, "eth0")}
protocol static {PROTOCOL} {{
  disabled;
  ipv4;
{routes}
}}
{static6}
protocol bgp to_router {{
  local {host.link.address} as {EDGE_AS + host.link.third};
  neighbor {host.link.gateway} as {ROUTER_AS};
{_SESSION}
  ipv4 {{ import none; export where proto = "{PROTOCOL}"; next hop self; }};
{session6}
}}
"""


def router_configuration(box: Box, cuts: Cuts) -> str:
    parts = [_head(f"{box.control().link.gateway}"), _bfd(box, "to-*")]
    parts += [_neighbour(box, host) for host in box.edges()]
    for version in (4, 6) if box.pool6 else (4,):
        suffix = "6" if version == 6 else ""
        for region in regions_of(box):
            table = region_table(box, region)
            parts.append(_nearest(box, f"near{suffix}_{region}", region, table, cuts, version=version))
        # What comes from this machine or from builds is nowhere; it is served as if it were at the control host.
        parts.append(_nearest(box, f"near{suffix}_all", box.control().region, KERNEL_MAIN, cuts, version=version))
    return "\n".join(parts)


def _head(router_id: str) -> str:
    return (
        "log stderr { info, warning, error, fatal, bug };\n"
        f"router id {router_id};\n"
        "protocol device { scan time 10; }"
    )


def _bfd(box: Box, devices: str) -> str:
    """A host that is not there yet is looked for slowly."""
    return (
        f'protocol bfd {{ interface "{devices}" {{ interval {box.bfd_interval_ms} ms; '
        f"multiplier {BFD_MULTIPLIER}; idle tx interval 300 ms; }}; }}"
    )


_SESSION = """  direct;
  bfd on;
  hold time 30;
  connect delay time 1;
  connect retry time 1;
  error wait time 1, 2;"""


def _neighbour(box: Box, host: Host) -> str:
    """The edge's announcements, and a table with this edge alone, for connections that it has taken."""
    third = host.link.third
    routes = "\n".join(f"  route {net} via {host.link.address} bfd;" for net in PUBLIC)
    session6 = f"  ipv6 {{ import where net = {box.pool6}; export none; }};" if box.pool6 else ""
    return f"""
protocol bgp edge_{third} {{
  local {host.link.gateway} as {ROUTER_AS};
  neighbor {host.link.address} as {EDGE_AS + third};
{_SESSION}
  ipv4 {{ import where net ~ {ANNOUNCED4}; export none; }};
{session6}
}}
ipv4 table only_{third};
protocol static host_{third} {{
  ipv4 {{ table only_{third}; }};
{routes}
}}
{_kernel(f"only_{third}", f"only_{third}", host_table(host))}"""


def _nearest(box: Box, name: str, region: str, kernel_table: int, cuts: Cuts, *, version: int) -> str:
    """A table of the edges in the order of their distance; those that are cut off from the region do not count."""
    edges = box.edges()
    order = nearest_first(region, list(dict.fromkeys(host.region for host in edges)))
    choices: list[str] = []
    for host in edges:
        if cuts.separate(region, host.region):
            continue
        preference = NEAREST - order.index(host.region)
        choices.append(f"    if from = {host.link.address} then {{ preference = {preference}; accept; }}")
    listed = "\n".join(choices)
    return f"""
ipv{version} table {name};
protocol pipe pipe_{name} {{
  table master{version};
  peer table {name};
  import none;
  export filter {{
{listed}
    reject;
  }};
}}
{_kernel(name, name, kernel_table, version=version)}"""


def _kernel(name: str, table: str, kernel_table: int, *, version: int = 4) -> str:
    """Only what edges announce is written."""
    announced = ANNOUNCED4 if version == 4 else f"[ {POOL6} ]"
    return f"""protocol kernel kernel_{name} {{
  kernel table {kernel_table};
  scan time 10;
  ipv{version} {{ table {table}; import none; export where net ~ {announced}; }};
}}"""
