"""Addresses of machines on a host. Pure: the choices are journaled with the machine."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable

import msgspec

from pantala.errors import CapacityError
from pantala.net import sixpn

SLOTS = 16_384
UID_BASE_FIRST = 1 << 20
UIDS = 65_536


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    slot: int
    ip4: str
    gateway4: str
    ip6: str
    uid_base: int


def choose(
    *, used: Iterable[int], machine_id: str, network: int, node: str, pool4: str, last: bool = False
) -> Addresses:
    """The lowest free slot and what follows from it. A /30 of the pool per slot; `fdaa` network, host, machine.
    `last`: the highest, which machines do not come to, for one that is not among them.

    The machine's part of its IPv6 address comes from its id, so that a slot used again gives no address again.
    Raises CapacityError when every slot is used.
    """
    pool = ipaddress.IPv4Network(pool4)
    taken = set(used)
    slots = range(min(SLOTS, pool.num_addresses // 4))
    slot = next((n for n in (reversed(slots) if last else slots) if n not in taken), None)
    if slot is None:
        raise CapacityError("no address is free on this host", excluded={"addresses": 1})
    base = int(pool.network_address) + slot * 4
    own = int.from_bytes(hashlib.sha256(machine_id.encode()).digest()[:4])
    ip6 = sixpn.machine_address(network, sixpn.host_id(node), own)
    return Addresses(
        slot=slot,
        ip4=str(ipaddress.IPv4Address(base + 2)),
        gateway4=str(ipaddress.IPv4Address(base + 1)),
        ip6=str(ip6),
        uid_base=UID_BASE_FIRST + slot * UIDS,
    )
