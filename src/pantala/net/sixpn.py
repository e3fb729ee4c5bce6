"""Addresses of the private network (6PN). Pure.

    fdaa : nnnn:nnnn : hhhh:hhhh : mmmm:mmmm : xxxx
     16      32          32          32        16 bits
    ULA    network      host       machine    free (a machine is ::2)

Source: `networking` reference, section 1. Network 0 is the platform's: `fdaa::3` answers DNS and the API on every host.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv6Address, IPv6Network

ULA = 0xFDAA
DNS = IPv6Address("fdaa::3")
API_PORT = 4280
EVERYTHING = IPv6Network("fdaa::/16")
MACHINE_SUFFIX, FLYCAST_SUFFIX = 2, 3
NO_HOST = 0
_ID_MAX = (1 << 32) - 1


def host_id(node: str) -> int:
    """A host's number follows from its id, so that nobody has to hand numbers out."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:4])


def machine_address(network: int, host: int, machine: int) -> IPv6Address:
    """The address of `machine` (unique on its host) in `network`. Raises ValueError for ids that do not fit."""
    if not 1 <= network <= _ID_MAX:
        raise ValueError(f"a network id is 1 to {_ID_MAX}, not {network}")
    for name, value in (("host", host), ("machine", machine)):
        if not 0 <= value <= _ID_MAX:
            raise ValueError(f"a {name} id is 0 to {_ID_MAX}, not {value}")
    return IPv6Address((ULA << 112) | (network << 80) | (host << 48) | (machine << 16) | MACHINE_SUFFIX)


def flycast_address(network: int, number: int) -> IPv6Address:
    """The `number`-th private address in `network`: on no host, every host's proxy takes it."""
    return IPv6Address(int(machine_address(network, NO_HOST, number)) - MACHINE_SUFFIX + FLYCAST_SUFFIX)


def network_prefix(network: int) -> IPv6Network:
    """The /48 of a network."""
    if not 1 <= network <= _ID_MAX:
        raise ValueError(f"a network id is 1 to {_ID_MAX}, not {network}")
    return IPv6Network(((ULA << 112) | (network << 80), 48))


def host_prefix(network: int, host: int) -> IPv6Network:
    """The /80 of a network on one host: what other hosts route to it."""
    return IPv6Network((int(machine_address(network, host, 0)) & ~0xFFFF, 80))


def network_of(address: IPv6Address) -> int:
    """The network id of an address. Raises ValueError outside 6PN."""
    if address not in EVERYTHING:
        raise ValueError(f"{address} is not a 6PN address")
    return (int(address) >> 80) & _ID_MAX
