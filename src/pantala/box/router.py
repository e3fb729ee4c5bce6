"""What the box's router is told: its firewall, its policy routing and the relay's settings. Pure.

    mark & 0xff     the host (third number of its link) that a packet goes to, whatever routes say: 6PN by the
                    host's part of the address, and connections to public addresses that a host took earlier
    mark & 0x10000  between regions: the relay holds the packet for as long as the way takes

Tables: 1000 + n sends clients of the n-th region to their nearest living edge, 2000 + third to that one host. BIRD
fills both (`routing.py`). A connection that an edge has taken stays with it while the host lives (its mark is kept
with the connection), so that an edge can leave without breaking what it still serves.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from ipaddress import IPv6Address

import msgspec

from pantala.box.distances import rtt_ms
from pantala.box.layout import POOL6, PUBLIC, ROUTER, Box, Host, Link
from pantala.errors import InvalidRequest
from pantala.net import sixpn

ROUTER_TABLE = "inet pantala_router"
REGION_TABLES, HOST_TABLES = 1000, 2000
HOST_MARKS, FAR_MARK = 0xFF, 0x10000
RELAY_QUEUE = 7
HOST_PART = "ffff:0:0:ffff:ffff::"
"""Of a 6PN address: what says which host it is on, with the prefix that all share."""


class Cuts(msgspec.Struct, frozen=True, kw_only=True):
    """Regions and nodes that are cut off. A region keeps its own clients and hosts; a node hears nobody. `loss`: share
    of the packets between regions that the relay loses."""

    regions: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    loss: float = 0.0

    def separate(self, a: str, b: str) -> bool:
        """Whether packets between two regions are lost."""
        return a != b and bool(self.regions & {a, b})


def regions_of(box: Box) -> list[str]:
    """Those that the box began with, then those that hosts brought along."""
    return list(dict.fromkeys([*box.regions, *(host.region for host in box.attached)]))


def region_table(box: Box, region: str) -> int:
    return REGION_TABLES + regions_of(box).index(region) + 1


def host_table(host: Host) -> int:
    return HOST_TABLES + host.link.third


def placed_links(box: Box) -> list[tuple[Link, str]]:
    """Links with the region they are in."""
    found = [(link, box.region_of(link)) for link in box.links()]
    return [(link, region) for link, region in found if region is not None]


# -- policy routing ----------------------------------------------------------------------------------------------------


def routing_commands(box: Box, link: Link) -> list[list[str]]:
    """Rules for what comes by a link, and for what was decided to leave by it."""
    commands: list[list[str]] = []
    region = box.region_of(link)
    if region is not None:
        rule = ["pref", "2000", "iif", link.router_device, "lookup", str(region_table(box, region))]
        commands.append(["ip", "-n", ROUTER, "rule", "add", *rule])
        if box.pool6:
            commands.append(["ip", "-6", "-n", ROUTER, "rule", "add", *rule])
    for host in box.all_hosts():
        if host.link == link:
            mark = ["pref", "1000", "fwmark", f"{link.third}/{HOST_MARKS}", "lookup", str(host_table(host))]
            commands.append(["ip", "-n", ROUTER, "rule", "add", *mark])
            if box.links_kind == "plain":
                route = ["default", "via", link.address6, "dev", link.router_device, "table", str(host_table(host))]
                commands.append(["ip", "-6", "-n", ROUTER, "rule", "add", *mark])
                commands.append(["ip", "-6", "-n", ROUTER, "route", "add", *route])
    return commands


def unrouting_commands(box: Box, link: Link) -> list[list[str]]:
    """The rules again, to be removed; the routes go with the device."""
    rules = [command for command in routing_commands(box, link) if "rule" in command]
    return [["del" if word == "add" else word for word in command] for command in rules]


# -- firewall ----------------------------------------------------------------------------------------------------------


def router_rules(box: Box, cuts: Cuts) -> str:
    """A script for `nft -f` that replaces the router's table in one step."""
    hosts = box.all_hosts()
    placed = placed_links(box)
    pairs = [(a, b) for a, b in itertools.permutations(placed, 2) if a[1] != b[1]]
    cut = [f'"{a.router_device}" . "{b.router_device}"' for (a, x), (b, y) in pairs if cuts.separate(x, y)]
    far = [f'"{a.router_device}" . "{b.router_device}"' for (a, _), (b, _) in pairs] if box.distances else []
    isolated = [f'"{host.link.router_device}"' for host in hosts if host.node in cuts.nodes]
    marks = [f'"{host.link.router_device}" : {host.link.third}' for host in hosts]
    parts = [f"{host_part(host.node)} : {host.link.third}" for host in hosts]
    senders = [f'"{host.link.router_device}" . {host.link.third}' for host in hosts]
    public = f"{{ {', '.join(PUBLIC)} }}"
    return f"""table {ROUTER_TABLE} {{ }}
delete table {ROUTER_TABLE}
table {ROUTER_TABLE} {{
  map mark_of_device {{ type ifname : mark; {_elements(marks)} }}
  map mark_of_host {{ type ipv6_addr : mark; {_elements(parts)} }}
  set sender {{ type ifname . mark; {_elements(senders)} }}
  set cut {{ type ifname . ifname; {_elements(cut)} }}
  set isolated {{ type ifname; {_elements(isolated)} }}
  set far {{ type ifname . ifname; {_elements(far)} }}
  chain choose {{
    type filter hook prerouting priority mangle; policy accept;
    ip daddr {public} ct mark != 0 tcp flags & (syn | ack) != syn meta mark set ct mark
    ip6 daddr {POOL6} ct mark != 0 tcp flags & (syn | ack) != syn meta mark set ct mark
    ip6 saddr {sixpn.EVERYTHING} jump between_hosts
  }}
  chain between_hosts {{
    meta mark set ip6 saddr & {HOST_PART} map @mark_of_host
    iifname . meta mark != @sender drop
    meta mark set 0
    meta mark set ip6 daddr & {HOST_PART} map @mark_of_host
  }}
  chain cuts {{
    type filter hook forward priority -210; policy accept;
    iifname . oifname @cut drop
    iifname @isolated drop
    oifname @isolated drop
    ip daddr {public} tcp flags & (syn | ack) == syn ct mark set oifname map @mark_of_device
    ip6 daddr {POOL6} tcp flags & (syn | ack) == syn ct mark set oifname map @mark_of_device
  }}
  chain distances {{
    type filter hook forward priority -200; policy accept;
    iifname . oifname @far meta mark set meta mark | {FAR_MARK:#x}
  }}
  chain to_router {{
    type filter hook input priority filter; policy accept;
    iifname @isolated drop
  }}
  chain from_router {{
    type filter hook output priority filter; policy accept;
    oifname @isolated drop
  }}
}}
"""


def queue_commands() -> list[list[str]]:
    """Packets with the mark wait in the relay's queue; without a relay they pass. `iptables` and not nft, whose queue
    statement is a kernel module of its own that is missing more often."""
    rule = ["-t", "mangle", "-A", "FORWARD", "-m", "mark", "--mark", f"{FAR_MARK:#x}/{FAR_MARK:#x}"]
    queue = ["-j", "NFQUEUE", "--queue-num", str(RELAY_QUEUE), "--queue-bypass"]
    return [["ip", "netns", "exec", ROUTER, tables, *rule, *queue] for tables in ("iptables", "ip6tables")]


def host_part(node: str) -> IPv6Address:
    """Network 0 of the host, masked as HOST_PART does."""
    return IPv6Address((sixpn.ULA << 112) | (sixpn.host_id(node) << 48))


def _elements(values: Sequence[str]) -> str:
    return f"elements = {{ {', '.join(values)} }}" if values else ""


# -- relay -------------------------------------------------------------------------------------------------------------


def relay_settings(box: Box, *, loss: float = 0.0) -> bytes:
    regions = regions_of(box)
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "queue": RELAY_QUEUE,
                "control": str(box.run_dir / "relay.sock"),
                "devices": {link.router_device: region for link, region in placed_links(box)},
                "pairs": [
                    {"a": a, "b": b, "rtt_ms": rtt_ms(a, b), "loss": loss}
                    for a, b in itertools.combinations(regions, 2)
                ],
            }
        )
    )


# -- cuts --------------------------------------------------------------------------------------------------------------


def add_cut(box: Box, cuts: Cuts, name: str) -> Cuts:
    """`name`: a region or a node. Raises InvalidRequest for neither."""
    if name in regions_of(box):
        return msgspec.structs.replace(cuts, regions=cuts.regions | {name})
    if name in {host.node for host in box.all_hosts()}:
        return msgspec.structs.replace(cuts, nodes=cuts.nodes | {name})
    known = [*regions_of(box), *(host.node for host in box.all_hosts())]
    raise InvalidRequest(f"{name} is neither a region nor a node of this box: {', '.join(known)}", field="name")


def heal(cuts: Cuts, names: Collection[str]) -> Cuts:
    """Without names: everything. Raises InvalidRequest for what is not cut off."""
    if not names:
        return Cuts()
    cut_off = cuts.regions | cuts.nodes
    if strange := sorted(set(names) - cut_off):
        raise InvalidRequest(f"{', '.join(strange)} is not cut off; {', '.join(sorted(cut_off)) or 'nothing'} is")
    return msgspec.structs.replace(cuts, regions=cuts.regions - set(names), nodes=cuts.nodes - set(names))
