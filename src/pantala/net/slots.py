"""Private IPv4 addresses of machines: a /30 per slot, the same range on every host, never seen outside it. Pure."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import msgspec

RANGE = IPv4Network("172.19.0.0/16")
PREFIX_LENGTH = 30
SLOTS = RANGE.num_addresses // 4


class SlotAddresses(msgspec.Struct, frozen=True, kw_only=True):
    machine: IPv4Address
    gateway: IPv4Address


def addresses(slot: int) -> SlotAddresses:
    """Addresses of a slot, 0 to `SLOTS - 1`. Raises ValueError for others."""
    if not 0 <= slot < SLOTS:
        raise ValueError(f"a slot is 0 to {SLOTS - 1}, not {slot}")
    first = RANGE.network_address + 4 * slot
    return SlotAddresses(machine=first + 2, gateway=first + 1)


def free_slot(taken: set[int]) -> int | None:
    """The lowest slot that is not taken, None when the host is full."""
    return next((slot for slot in range(SLOTS) if slot not in taken), None)
