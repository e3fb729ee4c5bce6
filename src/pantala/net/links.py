"""Names and `ip` commands of one machine's link. Pure: `HostNetwork` runs what these functions return.

host namespace                      machine's namespace
pnt<hash>  172.19.x.1/30, fe80::1 ─ veth ─ eth0  172.19.x.2/30, fdaa:…:2/128
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from pantala.domain.runtime import NetworkPlan
from pantala.net import slots

PREFIX = "pnt"
MACHINE_LINK = "eth0"
GATEWAY6 = "fe80::1"
ALIAS = "pantala:"

# Of the machine's namespace. Its owner may bind any port and ping without raw sockets; addresses are given, not found,
# so nothing waits for duplicate address detection.
SYSCTLS = (
    ("ipv4/ip_unprivileged_port_start", "0"),
    ("ipv4/ping_group_range", "0 65535"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
)


def link_name(machine_id: str) -> str:
    """15 characters, the most that a link may have; the id itself is in the link's alias."""
    digest = hashlib.blake2b(machine_id.encode(), digest_size=8).digest()
    return PREFIX + base64.b32encode(digest).decode().lower()[:12]


def create_link(plan: NetworkPlan, netns: Path) -> list[str]:
    """`ip -batch` lines that make the pair, one end in the namespace."""
    name = link_name(plan.machine_id)
    return [
        f"link add {name} type veth peer name {MACHINE_LINK} netns {netns}",
        f"link set dev {name} alias {ALIAS}{plan.machine_id}",
        f"link set dev {name} addrgenmode none",
    ]


def host_side(plan: NetworkPlan) -> list[str]:
    """`ip -batch` lines in the host's namespace; they repeat safely."""
    name = link_name(plan.machine_id)
    return [
        f"addr replace {plan.gateway4}/{slots.PREFIX_LENGTH} dev {name}",
        f"addr replace {GATEWAY6}/64 dev {name} nodad",
        f"link set dev {name} up",
        f"route replace {plan.ip6}/128 dev {name}",
    ]


def machine_side(plan: NetworkPlan) -> list[str]:
    """`ip -batch` lines in the machine's namespace; they repeat safely."""
    return [
        "link set dev lo up",
        f"addr replace {plan.ip4}/{slots.PREFIX_LENGTH} dev {MACHINE_LINK}",
        f"addr replace {plan.ip6}/128 dev {MACHINE_LINK} nodad",
        f"link set dev {MACHINE_LINK} up",
        f"route replace default via {plan.gateway4} dev {MACHINE_LINK}",
        f"route replace default via {GATEWAY6} dev {MACHINE_LINK}",
    ]
