"""Listening sockets out of the kernel's tables (`/proc/net/tcp` and its kin). Pure."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from pantala.domain.runtime import ListenSocket

_TCP_LISTEN = "0A"
_UDP_UNCONNECTED = "07"


def parse(proto: str, table: str) -> list[ListenSocket]:
    """`proto`: tcp or udp; the table may be of either address family. Lines that cannot be read are left out."""
    wanted = _TCP_LISTEN if proto == "tcp" else _UDP_UNCONNECTED
    found: list[ListenSocket] = []
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[3] != wanted or ":" not in fields[1]:
            continue
        address, _, port = fields[1].partition(":")
        try:
            found.append(ListenSocket(proto=proto, address=_address(address), port=int(port, 16), inode=int(fields[9])))
        except ValueError:
            continue
    return found


def _address(text: str) -> str:
    """Words of 32 bits in the host's byte order."""
    words = [int(text[index : index + 8], 16) for index in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return str(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed))
