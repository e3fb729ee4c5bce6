"""Host names that users bring: one spelling, and which ones nobody may bring. Pure.

Kept and compared in lower-case ASCII (`xn--…` for other scripts), without a trailing dot. `*.` as the first label
stands for exactly one label.
"""

from __future__ import annotations

import re
from ipaddress import ip_address

import idna

from pantala.errors import InvalidRequest

LENGTH_MAX = 253
PRIVATE_TLDS = frozenset(("internal", "flycast", "localhost", "local", "invalid", "onion", "arpa"))
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def normalise(text: str, *, field: str = "hostname") -> str:
    """Raises InvalidRequest saying what is wrong with it."""
    name = text.strip().rstrip(".").lower()
    wildcard, name = name.startswith("*."), name.removeprefix("*.")
    if not name:
        raise InvalidRequest("is required", field=field)
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except idna.IDNAError as error:
            raise InvalidRequest(f"{text!r} is no host name: {error}", field=field) from error
    if _is_address(name):
        raise InvalidRequest(f"{text!r} is an address; certificates are for names", field=field)
    labels = name.split(".")
    wrong = next((label for label in labels if not _LABEL.fullmatch(label)), None)
    if wrong is not None:
        raise InvalidRequest(
            f"{text!r} is no host name: {wrong!r} is not 1 to 63 letters, digits and inner dashes",
            field=field,
            hint="a * may stand for the whole first label only" if "*" in wrong else None,
        )
    if len(labels) < 2 or len(name) + 2 * wildcard > LENGTH_MAX:
        raise InvalidRequest(f"{text!r} must be a full name such as www.example.com", field=field)
    if labels[-1] in PRIVATE_TLDS or labels[-1].isdigit():
        raise InvalidRequest(f"names under .{labels[-1]} are not public", field=field)
    return f"*.{name}" if wildcard else name


def is_wildcard(hostname: str) -> bool:
    return hostname.startswith("*.")


def base(hostname: str) -> str:
    """What its DNS records for validation hang on: the name without the `*.`."""
    return hostname.removeprefix("*.")


def parent_wildcard(hostname: str) -> str:
    """The wildcard that would cover it."""
    return f"*.{hostname.partition('.')[2]}"


def is_under(hostname: str, domain: str) -> bool:
    name = base(hostname)
    return name == domain or name.endswith(f".{domain}")


def covers(names: list[str], hostname: str) -> bool:
    """Whether a certificate for `names` serves `hostname`."""
    known = {name.lower() for name in names}
    return hostname in known or (not is_wildcard(hostname) and parent_wildcard(hostname) in known)


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
