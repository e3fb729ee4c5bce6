"""How far the regions of a box are from one another: round trips in milliseconds. Pure.

Measured where we know better, else by the great circle: light in fibre, whose ways are no great circles, takes about
1 ms there and back for 75 km. Routing (`routing.py`) and the relay (`router.py`) read the same matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pantala.control.regions import BY_CODE

MEASURED_MS = {("iad", "lhr"): 75.0, ("iad", "nrt"): 160.0, ("lhr", "nrt"): 220.0}
UNKNOWN_MS = 100.0
"""To a region code of the operator's own, which has no place on the map."""
KM_PER_MS = 75.0
EARTH_RADIUS_KM = 6371.0


def rtt_ms(a: str, b: str) -> float:
    if a == b:
        return 0.0
    first, second = sorted((a, b))
    if (measured := MEASURED_MS.get((first, second))) is not None:
        return measured
    if first not in BY_CODE or second not in BY_CODE:
        return UNKNOWN_MS
    return round(1.0 + _great_circle_km(first, second) / KM_PER_MS, 1)


def matrix(regions: Sequence[str]) -> list[list[float]]:
    return [[rtt_ms(a, b) for b in regions] for a in regions]


def nearest_first(region: str, others: Sequence[str]) -> list[str]:
    """`others` by their distance from `region`; equally near ones by code, so that every reader decides alike."""
    return sorted(others, key=lambda other: (rtt_ms(region, other), other))


def _great_circle_km(a: str, b: str) -> float:
    here, there = BY_CODE[a], BY_CODE[b]
    lat1, lat2 = math.radians(here.latitude), math.radians(there.latitude)
    turn = math.radians(there.longitude - here.longitude)
    haversine = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin(turn / 2) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(haversine))
