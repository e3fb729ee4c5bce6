"""What of the outside a host can reach: resolvers for its machines, Docker Hub for builds."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import httpx2

from pantala.errors import InvalidRequest

HUB = "https://registry-1.docker.io/v2/"
HUB_ANSWERS_WITHIN_S = 3.0


def resolvers(*, loopback: bool = False) -> list[str]:
    """Resolvers of this machine; those on a loopback address only where a host shares this machine's namespace.
    Raises InvalidRequest when there is none."""
    found: list[str] = []
    for path in (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")):
        if path.is_file():
            lines = [line.split() for line in path.read_text().splitlines()]
            found += [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    usable = [text for text in dict.fromkeys(found) if _is_usable(text, loopback=loopback)]
    if not usable:
        raise InvalidRequest(
            f"no resolver that a host can reach; /etc/resolv.conf names {', '.join(found) or 'none'}",
            hint="put a resolver other than a loopback address into /etc/resolv.conf",
        )
    return usable


def hub_answers() -> bool:
    """Whether Docker Hub is in reach; then Dockerfiles get their bases from where they say."""
    try:
        return httpx2.get(HUB, timeout=HUB_ANSWERS_WITHIN_S).status_code in (200, 401)
    except httpx2.HTTPError:
        return False


def _is_usable(text: str, *, loopback: bool) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return address.version == 4 and (loopback or not address.is_loopback)
