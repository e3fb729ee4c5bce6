"""Names, addresses and routes of one machine's link. Pure: `pantala-init network` does what these functions return.

host namespace                      machine's namespace
pnt<hash>  172.19.x.1/30, fe80::1 ─ veth ─ eth0  172.19.x.2/30, fdaa:…:2/128
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

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


def create_link(plan: NetworkPlan) -> dict[str, str]:
    """The pair: its end here, its end in the machine's namespace, and whose it is."""
    return {"name": link_name(plan.machine_id), "peer": MACHINE_LINK, "alias": f"{ALIAS}{plan.machine_id}"}


def host_side(plan: NetworkPlan) -> dict[str, Any]:
    """What the end in the host's namespace gets."""
    return {
        "addresses": [(plan.gateway4, slots.PREFIX_LENGTH), (GATEWAY6, 64)],
        "routes": [{"to": plan.ip6, "length": 128, "via": None}],
    }


def machine_side(plan: NetworkPlan) -> dict[str, Any]:
    """What the end in the machine's namespace gets."""
    return {
        "addresses": [(plan.ip4, slots.PREFIX_LENGTH), (plan.ip6, 128)],
        "routes": [
            {"to": "0.0.0.0", "length": 0, "via": plan.gateway4},  # noqa: S104 - the default route, nothing is bound
            {"to": "::", "length": 0, "via": GATEWAY6},
        ],
    }
