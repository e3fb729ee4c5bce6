"""Request ids as proxies make them: a ULID, then `-` and the region of the edge."""

from __future__ import annotations

import re

from pantala.errors import InvalidRequest

_FORM = re.compile(r"([0-7][0-9A-HJKMNP-TV-Z]{25})(?:-([a-z0-9-]{1,32}))?", re.IGNORECASE)
_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def parse(text: str) -> tuple[str, str]:
    """The id without its region, and the region (empty where it names none). Raises InvalidRequest."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise InvalidRequest(
            f"{text[:60]!r} is not a request id: 26 digits and letters, then perhaps - and a region",
            field="id",
            hint="answers carry theirs in the header Fly-Request-Id",
        )
    return found[1].upper(), (found[2] or "").lower()


def made_at_ms(ulid: str) -> int:
    """By the clock of its edge."""
    value = 0
    for digit in ulid[:10]:
        value = value * 32 + _DIGITS.index(digit)
    return value
