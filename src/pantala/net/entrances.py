"""Which connections to this host end at its proxy, whatever the port: public addresses and Flycast.

The proxy has plain sockets at ports 80 and 443 of the shared edge address. Everything else reaches one transparent
socket (`tproxy`), which sees the address and port that a client meant:

    edge4, edge6       address                   every port of it: shared and dedicated addresses that are routed here
    own4, own6         address . ports           of an address that is the host's own: only what apps declare
    kept4, kept6       address . port            not these: somebody listens there himself
    flycast6           network /48 . address     from machines of that network only

`plan_entrances` is pure: rows of the view to elements of these sets. `Entrances` makes the kernel agree, in one
transaction; the rules that read the sets are in `rules.py`. Called by `pantala.agent.entrances`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

from pantala.net import commands, rules, sixpn, sockets

PLAIN_PORTS = (53, 80, 443)
"""Of an edge address: DNS of a box, HTTP and HTTPS have sockets of their own."""
RESERVED_PORTS = frozenset({22, 53, 80, 443})
"""Never taken from an address that is the host's own, even while nobody listens."""
Range = tuple[int, int]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """An address as the view tells it. `network`: of a Flycast address, whose machines may use it."""

    ip: str
    private: bool = False
    network: int = 0


class EntrancePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Elements by set, as nft reads them."""

    elements: dict[str, tuple[str, ...]]


def plan_entrances(
    addresses: Iterable[Address],
    *,
    edge: Sequence[str],
    own: Sequence[str],
    declared: Iterable[Range],
    used: Iterable[int],
) -> EntrancePlan:
    """`edge`: addresses at which this host takes public traffic, none where it is no edge. `own`: addresses that the
    host itself lives at. `declared`: ports of apps' services. `used`: ports at which something else listens here."""
    found: dict[str, set[str]] = {name: set() for name in rules.ENTRANCE_SETS}
    addresses = list(addresses)
    public = {ip_address(text) for text in edge}
    for address in edge:
        if address not in own:
            ip = ip_address(address)
            found[f"kept{ip.version}"] |= {f"{ip} . {port}" for port in PLAIN_PORTS}
    if edge:
        public |= {ip_address(one.ip) for one in addresses if not one.private}
    home = {ip_address(text) for text in own}
    free = without(declared, RESERVED_PORTS | set(used))
    for ip in public:
        if ip in home:
            found[f"own{ip.version}"] |= {f"{ip} . {_ports(part)}" for part in free}
        else:
            found[f"edge{ip.version}"].add(str(ip))
    for one in addresses:
        if one.private and one.network:
            prefix = sixpn.network_prefix(one.network)
            found["flycast6"].add(f"{prefix} . {IPv6Address(one.ip)}")
    return EntrancePlan(elements={name: tuple(sorted(values)) for name, values in found.items()})


def _ports(part: Range) -> str:
    first, last = part
    return str(first) if first == last else f"{first}-{last}"


def without(ranges: Iterable[Range], holes: Iterable[int]) -> list[Range]:
    """The ports of `ranges` that are no holes, as few ranges as possible."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    for hole in set(holes):
        merged = [part for first, last in merged for part in _split(first, last, hole)]
    return merged


def _split(first: int, last: int, hole: int) -> list[Range]:
    if not first <= hole <= last:
        return [(first, last)]
    parts = [(first, hole - 1), (hole + 1, last)]
    return [(low, high) for low, high in parts if low <= high]


def script(plan: EntrancePlan) -> str:
    """For `nft -f`: exactly these elements, in one transaction."""
    lines: list[str] = []
    for name in rules.ENTRANCE_SETS:
        lines.append(f"flush set {rules.TABLE} {name}")
        if values := plan.elements.get(name):
            lines.append(f"add element {rules.TABLE} {name} {{ {', '.join(values)} }}")
    return "\n".join(lines) + "\n"


class Entrances:
    """The sets of this host's firewall; the table is `HostNetwork`'s."""

    async def apply(self, plan: EntrancePlan) -> None:
        """Repeats safely. Raises DriverError; then nothing has changed."""
        await commands.run(["nft", "-f", "-"], stdin=script(plan))

    async def listening(self, *addresses: str) -> set[int]:
        """TCP ports at which something in this namespace listens on one of the addresses, or on all."""
        text = await commands.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"])
        ours = {ip_address(text) for text in addresses}
        return {found.port for found in sockets.parse("tcp", text) if _covers(found.address, ours)}


def _covers(listening: str, ours: set[IPv4Address | IPv6Address]) -> bool:
    ip = ip_address(listening)
    return ip.is_unspecified or ip in ours
