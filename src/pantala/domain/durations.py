"""Durations of machine documents: Go strings, or integers of nanoseconds."""

from __future__ import annotations

from pantala.errors import InvalidRequest
from pantala.kit.units import parse_go_duration


def seconds(value: str | int | None, *, field: str, default: float) -> float:
    """Seconds of a wire duration; `default` when unset. Raises InvalidRequest naming `field`."""
    if value is None or value == "":
        return default
    if isinstance(value, int):
        return value / 1_000_000_000
    try:
        return parse_go_duration(value)
    except ValueError as error:
        raise InvalidRequest(str(error), field=field) from error
