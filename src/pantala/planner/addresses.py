"""Which address of the operator's pools an app gets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import islice

import msgspec

from pantala.errors import InvalidRequest

Prefix = IPv4Network | IPv6Network


class Pick(msgspec.Struct, frozen=True, kw_only=True):
    """`address` None: nothing is free. `used` and `resting` say why: given out, released too short a time ago."""

    address: str | None
    used: int = 0
    resting: int = 0


def prefixes(texts: Sequence[str], *, version: int, field: str) -> list[Prefix]:
    """Raises InvalidRequest for what is no prefix, of the other version, or overlaps another."""
    found: list[Prefix] = []
    for text in texts:
        try:
            prefix = ip_network(text)
        except ValueError as error:
            raise InvalidRequest(f"{text!r} is no prefix such as 192.0.2.0/24: {error}", field=field) from error
        if prefix.version != version:
            raise InvalidRequest(f"{text!r} is not IPv{version}", field=field)
        if other := next((one for one in found if one.overlaps(prefix)), None):  # pyright: ignore[reportArgumentType]
            raise InvalidRequest(f"{text} overlaps {other}", field=field)
        found.append(prefix)
    return found


def pick(pool: Sequence[Prefix], taken: Mapping[str, bool]) -> Pick:
    """The first that is free, prefix after prefix. `taken`: true for those in use, false for those that rest."""
    for prefix in pool:
        # Among one more than there are taken at least one is free, unless the prefix ends before.
        for address in islice(prefix.hosts(), len(taken) + 1):
            if str(address) not in taken:
                return Pick(address=str(address))
    used = sum(taken.values())
    return Pick(address=None, used=used, resting=len(taken) - used)
