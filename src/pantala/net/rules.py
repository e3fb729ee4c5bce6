"""The firewall of a host: one nftables table, `inet pantala`, with sets that hold machines. Pure text.

Rules are written once (`ruleset`); a machine is three set elements (`add_machine`), so that the cost of a packet does
not grow with the number of machines:

    source4, source6   interface . address      what a machine may send from
    network6           interface . /48          whom it may reach, and be reached by, in the private network

What other hosts are behind is one more set, and the only way in and out of this host for 6PN packets:

    peers6             interface . /80          a network on another host, by the link to it (`peers.py`)

A machine with network policies (`domain/policies.py`) has elements in four more; what they do not open is refused.
Only packets that this host forwards are asked about: the proxy, checks, logins and the answers of DNS come from the
host itself. An established connection goes on.

    ruled_in, ruled_out   interface                      nothing is open by default any more, in that direction
    open_in, open_out     interface . protocol . port    what is

What ends at this host's proxy, whatever the port, is a chain of its own (`entrances`); `entrances.py` fills its sets.

Everything from a machine's interface that no set allows is refused: with an ICMP error, so that a program
learns at once, except forged sources, which are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

import msgspec

from pantala.domain.policies import Allowed
from pantala.domain.runtime import NetworkPlan
from pantala.net import links, sixpn, slots

TABLE_NAME = "pantala"
TABLE = f"inet {TABLE_NAME}"
SETS = ("source4", "source6", "network6", "ruled_in", "ruled_out", "open_in", "open_out")
ENTRANCE_SETS = ("edge4", "edge6", "own4", "own6", "kept4", "kept6", "flycast6")

ENTRY_PORT = 4480
"""Of the proxy's transparent sockets, on loopback: nobody reaches them but by these rules."""
ENTRY_MARK = "0x40000"
ENTRY_TABLE = 4480
"""Of routing: what bears the mark is for this host, whoever's address it has."""

# Never reachable from a machine: this network, loopback, link-local with the clouds' metadata services, other machines'
# IPv4, multicast and reserved; by IPv6 the same, with the ranges that wrap IPv4 addresses.
CLOSED4 = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", str(slots.RANGE), "224.0.0.0/3")
CLOSED6 = (
    "::/96",
    "::ffff:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "2002::/16",
    "fdaa::/16",
    "fe80::/10",
    "ff00::/8",
)
# Closed unless the operator allows them (`allow_private_ranges`). The first of CLOSED6 win over these.
PRIVATE4 = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15")
PRIVATE6 = ("fc00::/7",)


class EgressPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What machines may reach outside. `closed`: further addresses or networks, such as those of the other hosts."""

    allow_private_ranges: bool = False
    closed: tuple[str, ...] = ()


def ruleset(policy: EgressPolicy) -> str:
    """A script for `nft -f`: makes or renews everything but the elements of machines, in one transaction."""
    extra = [ip_network(text) for text in policy.closed]
    closed4 = [*CLOSED4, *(str(net) for net in extra if isinstance(net, IPv4Network))]
    closed6 = [*CLOSED6, *(str(net) for net in extra if isinstance(net, IPv6Network))]
    private4 = () if policy.allow_private_ranges else PRIVATE4
    private6 = () if policy.allow_private_ranges else PRIVATE6
    dns = sixpn.DNS
    others = f'!= {{ "lo", "{links.PREFIX}*" }}'
    return f"""
table {TABLE} {{
  set source4 {{ type ifname . ipv4_addr; }}
  set source6 {{ type ifname . ipv6_addr; }}
  set network6 {{ type ifname . ipv6_addr; flags interval; }}
  set ruled_in {{ type ifname; }}
  set ruled_out {{ type ifname; }}
  set open_in {{ type ifname . inet_proto . inet_service; }}
  set open_out {{ type ifname . inet_proto . inet_service; }}
  set peers6 {{ type ifname . ipv6_addr; flags interval; }}
  set edge4 {{ type ipv4_addr; }}
  set edge6 {{ type ipv6_addr; }}
  set own4 {{ type ipv4_addr . inet_service; flags interval; }}
  set own6 {{ type ipv6_addr . inet_service; flags interval; }}
  set kept4 {{ type ipv4_addr . inet_service; }}
  set kept6 {{ type ipv6_addr . inet_service; }}
  set flycast6 {{ type ipv6_addr . ipv6_addr; flags interval; }}
  set closed4 {{ type ipv4_addr; flags interval; auto-merge; }}
  set closed6 {{ type ipv6_addr; flags interval; auto-merge; }}
  chain source_check {{ type filter hook prerouting priority raw; policy accept; }}
  chain entrances {{ type filter hook prerouting priority mangle; policy accept; }}
  chain to_proxy {{ }}
  chain input {{ type filter hook input priority filter; policy accept; }}
  chain forward {{ type filter hook forward priority filter; policy accept; }}
  chain egress {{ type nat hook postrouting priority srcnat; policy accept; }}
  chain from_machine {{ }}
  chain machine_to_host {{ }}
  chain machine_out {{ }}
  chain machine_in {{ }}
  chain policies_in {{ }}
  chain policies_out {{ }}
  chain peer_to_host {{ }}
}}
flush chain {TABLE} source_check
flush chain {TABLE} entrances
flush chain {TABLE} to_proxy
flush chain {TABLE} input
flush chain {TABLE} forward
flush chain {TABLE} egress
flush chain {TABLE} from_machine
flush chain {TABLE} machine_to_host
flush chain {TABLE} machine_out
flush chain {TABLE} machine_in
flush chain {TABLE} policies_in
flush chain {TABLE} policies_out
flush chain {TABLE} peer_to_host
flush set {TABLE} closed4
flush set {TABLE} closed6
{_elements("closed4", [*closed4, *private4])}
{_elements("closed6", [*closed6, *private6])}
table {TABLE} {{
  chain source_check {{
    iifname "{links.PREFIX}*" jump from_machine
    iifname {others} ip6 saddr {sixpn.EVERYTHING} iifname . ip6 saddr != @peers6 counter drop
  }}
  chain from_machine {{
    ip6 saddr {{ ::, fe80::/10 }} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    iifname . ip saddr @source4 accept
    iifname . ip6 saddr @source6 accept
    counter drop
  }}
  chain entrances {{
    meta l4proto != tcp accept
    iifname "{links.PREFIX}*" ip6 saddr . ip6 daddr @flycast6 jump to_proxy
    iifname "{links.PREFIX}*" accept
    ip daddr . tcp dport @kept4 accept
    ip6 daddr . tcp dport @kept6 accept
    ip daddr @edge4 jump to_proxy
    ip6 daddr @edge6 jump to_proxy
    ip daddr . tcp dport @own4 jump to_proxy
    ip6 daddr . tcp dport @own6 jump to_proxy
  }}
  chain to_proxy {{
    meta l4proto tcp tproxy ip to 127.0.0.1:{ENTRY_PORT} meta mark set {ENTRY_MARK} accept
    meta l4proto tcp tproxy ip6 to [::1]:{ENTRY_PORT} meta mark set {ENTRY_MARK} accept
  }}
  chain input {{
    iifname "{links.PREFIX}*" jump machine_to_host
    iifname {others} ip6 saddr {sixpn.EVERYTHING} jump peer_to_host
    iifname {others} ip6 daddr {sixpn.EVERYTHING} jump peer_to_host
  }}
  chain peer_to_host {{
    ct state established,related accept
    counter drop
  }}
  chain machine_to_host {{
    ct state established,related accept
    meta mark & {ENTRY_MARK} == {ENTRY_MARK} accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    ip6 daddr {dns} udp dport 53 accept
    ip6 daddr {dns} tcp dport {{ 53, {sixpn.API_PORT} }} accept
    ip6 daddr {dns} icmpv6 type echo-request accept
    icmpv6 type {{ nd-router-solicit, mld-listener-report, mld2-listener-report }} drop
    counter reject with icmpx admin-prohibited
  }}
  chain forward {{
    iifname "{links.PREFIX}*" jump machine_out
    oifname "{links.PREFIX}*" jump machine_in
    iifname {others} oifname {others} ip6 saddr {sixpn.EVERYTHING} counter drop
    iifname {others} oifname {others} ip6 daddr {sixpn.EVERYTHING} counter drop
  }}
  chain policies_in {{
    oifname . meta l4proto . th dport @open_in return
    counter reject with icmpx admin-prohibited
  }}
  chain policies_out {{
    iifname . meta l4proto . th dport @open_out return
    counter reject with icmpx admin-prohibited
  }}
  chain machine_out {{
    ct state established,related accept
    iifname @ruled_out jump policies_out
    oifname @ruled_in jump policies_in
    oifname "{links.PREFIX}*" iifname . ip6 daddr @network6 accept
    iifname . ip6 daddr @network6 oifname . ip6 daddr @peers6 accept
    ip daddr @closed4 counter reject with icmpx admin-prohibited
    ip6 daddr @closed6 counter reject with icmpx admin-prohibited
    oifname "{links.PREFIX}*" counter reject with icmpx admin-prohibited
    accept
  }}
  chain machine_in {{
    ct state established,related accept
    oifname @ruled_in jump policies_in
    oifname . ip6 saddr @network6 accept
    counter reject with icmpx admin-prohibited
  }}
  chain egress {{
    ip saddr {slots.RANGE} oifname != {{ "lo", "{links.PREFIX}*" }} masquerade
    ip6 saddr {sixpn.EVERYTHING} ip6 daddr != {sixpn.EVERYTHING} oifname != {{ "lo", "{links.PREFIX}*" }} masquerade
  }}
}}
"""


def _elements(name: str, values: Sequence[str]) -> str:
    return f"add element {TABLE} {name} {{ {', '.join(values)} }}"


def machine_elements(plan: NetworkPlan) -> list[dict[str, Any]]:
    """The three that each machine has, for `pantala-init network`; `last` of a range. Those of policies are texts."""
    network = sixpn.network_prefix(plan.network)
    ranges = {
        "source4": (plan.ip4, None),
        "source6": (plan.ip6, None),
        "network6": (str(network[0]), str(network[-1])),
    }
    return [
        {
            "table": TABLE_NAME,
            "set": name,
            "interface": links.link_name(plan.machine_id),
            "first": first,
            "last": last,
            "comment": plan.machine_id,
        }
        for name, (first, last) in ranges.items()
    ]


def _machine_elements(plan: NetworkPlan) -> list[tuple[str, str]]:
    link = f'"{links.link_name(plan.machine_id)}"'
    return [
        ("source4", f"{link} . {plan.ip4}"),
        ("source6", f"{link} . {plan.ip6}"),
        ("network6", f"{link} . {sixpn.network_prefix(plan.network)}"),
        *_policy_elements(plan.machine_id, plan.allowed or Allowed()),
    ]


def _policy_elements(machine_id: str, allowed: Allowed) -> list[tuple[str, str]]:
    link = f'"{links.link_name(machine_id)}"'
    return [
        element
        for direction, ports in (("in", allowed.ingress), ("out", allowed.egress))
        if ports is not None
        for element in (
            (f"ruled_{direction}", link),
            *((f"open_{direction}", f"{link} . {protocol} . {port}") for protocol, port in ports),
        )
    ]


def add_machine(plan: NetworkPlan, former: Sequence[Allowed] = ()) -> str:
    """Elements of one machine, each with its id as comment; repeats safely. `former`: what it may have been allowed
    before, which goes in the same transaction."""
    wanted = _machine_elements(plan)
    before = [element for allowed in former for element in _policy_elements(plan.machine_id, allowed)]
    gone = [element for element in dict.fromkeys(before) if element not in wanted]
    return _add(plan.machine_id, gone) + _delete(gone) + _add(plan.machine_id, wanted)


def remove_machine(plan: NetworkPlan, former: Sequence[Allowed] = ()) -> str:
    everything = _machine_elements(plan)
    everything += [element for allowed in former for element in _policy_elements(plan.machine_id, allowed)]
    everything = list(dict.fromkeys(everything))
    return _add(plan.machine_id, everything) + _delete(everything)


def _add(machine_id: str, elements: Sequence[tuple[str, str]]) -> str:
    return "".join(f'add element {TABLE} {name} {{ {text} comment "{machine_id}" }}\n' for name, text in elements)


def _delete(elements: Sequence[tuple[str, str]]) -> str:
    """To be added first where they may be missing: removing what is not there would fail."""
    return "".join(f"delete element {TABLE} {name} {{ {text} }}\n" for name, text in elements)


def set_peers(device: str, prefixes: Sequence[str]) -> str:
    """Exactly these /80s are behind `device`, none behind any other."""
    elements = ", ".join(f'"{device}" . {prefix}' for prefix in prefixes)
    return f"flush set {TABLE} peers6\n" + (f"add element {TABLE} peers6 {{ {elements} }}\n" if elements else "")


def teardown() -> str:
    return f"table {TABLE} {{ }}\ndelete table {TABLE}\n"
