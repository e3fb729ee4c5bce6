"""Identifiers of the shapes that the Machines API gives them."""

from __future__ import annotations

import secrets
import time

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

_ADJECTIVES = (
    "amber autumn bold brave bright calm clear cold crimson dark dawn deep delicate divine dry empty "
    "falling fragrant frosty gentle green hidden holy icy late little lively long misty morning muddy "
    "nameless old patient polished proud purple quiet red restless rough silent small snowy solitary "
    "sparkling still summer twilight wandering weathered white wild winter wispy young"
).split()
_NOUNS = (
    "bird breeze brook bush butterfly cherry cloud darkness dawn dew dream dust feather field fire "
    "firefly flower fog forest frog frost glade glitter grass haze hill lake leaf meadow moon morning "
    "mountain night paper pine pond rain resonance river sea shadow shape silence sky smoke snow "
    "snowflake sound star sun sunset surf thunder tree violet voice water waterfall wave wildflower wind "
    "wood"
).split()


def machine_id() -> str:
    """14 hex characters, stable for a machine's life."""
    return secrets.token_hex(7)


def ulid(at_ms: int | None = None) -> str:
    """26 Crockford characters: 48 bits of milliseconds, 80 random bits. Sorts by time."""
    value = ((at_ms if at_ms is not None else time.time_ns() // 1_000_000) << 80) | secrets.randbits(80)
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5))


def ulid_ms(text: str) -> int:
    """When a ULID was made."""
    value = 0
    for character in text:
        value = value * 32 + _CROCKFORD.index(character)
    return value >> 80


def generated_name() -> str:
    """`adjective-noun-1234`."""
    return f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{secrets.randbelow(9000) + 1000}"


def token(prefix: str, *, entropy_bytes: int = 32) -> str:
    return f"{prefix}_{secrets.token_urlsafe(entropy_bytes)}"
