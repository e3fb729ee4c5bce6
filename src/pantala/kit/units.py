"""Durations in Go's notation and sizes, as fly.toml and the Machines API write them."""

from __future__ import annotations

import re

_GO_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_GO_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def parse_go_duration(text: str) -> float:
    """Seconds of `300ms`, `1m21s`, `2h45m`; a bare `0` is allowed. Raises ValueError otherwise."""
    stripped = text.strip()
    if stripped == "0":
        return 0.0
    total, end = 0.0, 0
    for part in _GO_PART.finditer(stripped):
        if part.start() != end:
            break
        total += float(part[1]) * _GO_UNITS_S[part[2]]
        end = part.end()
    if not stripped or end != len(stripped):
        raise ValueError(f"{text!r} is not a duration such as 10s, 1m30s or 500ms")
    return total


def format_go_duration(seconds: float) -> str:
    """The shortest of Go's spellings: `500ms`, `15s`, `1m30s`."""
    ms = round(seconds * 1000)
    if ms % 1000:
        return f"{ms}ms"
    whole = ms // 1000
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    text = (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "") + (f"{secs}s" if secs else "")
    return text or "0s"
