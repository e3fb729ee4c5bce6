"""Region codes: airport codes with names and places, the aliases of groups of them, and expressions over both.

Codes and coordinates are public facts (IATA); which of them this cluster has is `ControlSettings.regions`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import asin, cos, radians, sin, sqrt
from typing import NamedTuple

from pantala.errors import InvalidRequest
from pantala.wire.api import Region


class RegionFacts(NamedTuple):
    code: str
    name: str
    latitude: float
    longitude: float
    geo_region: str
    gateway: bool


REGIONS = (
    RegionFacts("ams", "Amsterdam, Netherlands", 52.309, 4.764, "europe", True),
    RegionFacts("arn", "Stockholm, Sweden", 59.652, 17.919, "europe", True),
    RegionFacts("atl", "Atlanta, Georgia (US)", 33.637, -84.428, "north_america", False),
    RegionFacts("bog", "Bogota, Colombia", 4.702, -74.147, "south_america", False),
    RegionFacts("bom", "Mumbai, India", 19.089, 72.868, "asia_pacific", True),
    RegionFacts("bos", "Boston, Massachusetts (US)", 42.364, -71.005, "north_america", False),
    RegionFacts("cdg", "Paris, France", 49.01, 2.548, "europe", True),
    RegionFacts("den", "Denver, Colorado (US)", 39.862, -104.673, "north_america", False),
    RegionFacts("dfw", "Dallas, Texas (US)", 32.897, -97.038, "north_america", True),
    RegionFacts("ewr", "Secaucus, NJ (US)", 40.69, -74.175, "north_america", True),
    RegionFacts("eze", "Ezeiza, Argentina", -34.822, -58.536, "south_america", False),
    RegionFacts("fra", "Frankfurt, Germany", 50.033, 8.571, "europe", True),
    RegionFacts("gdl", "Guadalajara, Mexico", 20.522, -103.311, "north_america", False),
    RegionFacts("gig", "Rio de Janeiro, Brazil", -22.81, -43.251, "south_america", False),
    RegionFacts("gru", "Sao Paulo, Brazil", -23.432, -46.47, "south_america", False),
    RegionFacts("hkg", "Hong Kong, Hong Kong", 22.309, 113.915, "asia_pacific", False),
    RegionFacts("iad", "Ashburn, Virginia (US)", 38.945, -77.456, "north_america", True),
    RegionFacts("jnb", "Johannesburg, South Africa", -26.139, 28.246, "africa", False),
    RegionFacts("lax", "Los Angeles, California (US)", 33.942, -118.408, "north_america", True),
    RegionFacts("lhr", "London, United Kingdom", 51.471, -0.462, "europe", True),
    RegionFacts("mad", "Madrid, Spain", 40.472, -3.561, "europe", False),
    RegionFacts("mia", "Miami, Florida (US)", 25.793, -80.291, "north_america", False),
    RegionFacts("nrt", "Tokyo, Japan", 35.765, 140.386, "asia_pacific", True),
    RegionFacts("ord", "Chicago, Illinois (US)", 41.979, -87.905, "north_america", True),
    RegionFacts("otp", "Bucharest, Romania", 44.571, 26.085, "europe", False),
    RegionFacts("phx", "Phoenix, Arizona (US)", 33.434, -112.012, "north_america", False),
    RegionFacts("qro", "Queretaro, Mexico", 20.617, -100.186, "north_america", False),
    RegionFacts("scl", "Santiago, Chile", -33.393, -70.786, "south_america", False),
    RegionFacts("sea", "Seattle, Washington (US)", 47.45, -122.309, "north_america", False),
    RegionFacts("sin", "Singapore, Singapore", 1.35, 103.994, "asia_pacific", True),
    RegionFacts("sjc", "San Jose, California (US)", 37.363, -121.929, "north_america", True),
    RegionFacts("syd", "Sydney, Australia", -33.946, 151.177, "asia_pacific", True),
    RegionFacts("waw", "Warsaw, Poland", 52.166, 20.967, "europe", False),
    RegionFacts("yul", "Montreal, Canada", 45.471, -73.741, "north_america", False),
    RegionFacts("yyz", "Toronto, Canada", 43.677, -79.631, "north_america", True),
)
ELSEWHERE: dict[str, tuple[float, float]] = {
    "akl": (-37.01, 174.79), "ath": (37.94, 23.94), "ber": (52.36, 13.5), "bcn": (41.3, 2.08), "bkk": (13.69, 100.75),
    "bru": (50.9, 4.48), "cai": (30.12, 31.41), "cpt": (-33.97, 18.6), "cph": (55.62, 12.65), "dca": (38.85, -77.04),
    "del": (28.57, 77.1), "dub": (53.42, -6.27), "dus": (51.29, 6.77), "dxb": (25.25, 55.36), "gva": (46.24, 6.11),
    "ham": (53.63, 9.99), "hel": (60.32, 24.96), "hnd": (35.55, 139.78), "iah": (29.98, -95.34), "icn": (37.46, 126.44),
    "ist": (41.26, 28.74), "jfk": (40.64, -73.78), "kix": (34.43, 135.24), "las": (36.08, -115.15),
    "lgw": (51.15, -0.19), "lim": (-12.02, -77.11), "lis": (38.77, -9.13), "los": (6.58, 3.32), "maa": (12.99, 80.17),
    "man": (53.35, -2.28), "mel": (-37.67, 144.84), "mex": (19.44, -99.07), "muc": (48.35, 11.79), "mxp": (45.63, 8.72),
    "nbo": (-1.32, 36.93), "osl": (60.19, 11.1), "per": (-31.94, 115.97), "pdx": (45.59, -122.6),
    "pek": (40.08, 116.58),
    "prg": (50.1, 14.26), "pvg": (31.14, 121.81), "sfo": (37.62, -122.38), "slc": (40.79, -111.98),
    "tlv": (32.01, 34.89), "tpe": (25.08, 121.23), "vie": (48.11, 16.57), "yvr": (49.19, -123.18), "zrh": (47.46, 8.55),
}  # fmt: skip
"""Well-known airports that are no region: whoever asks for one is told what is near it."""

BY_CODE = {region.code: region for region in REGIONS}
ALIASES: dict[str, frozenset[str]] = {
    "apac": frozenset("bom nrt sin syd".split()),
    "eu": frozenset("ams arn cdg fra lhr".split()),
    "na": frozenset("dfw ewr iad lax ord sjc yyz".split()),
    "sa": frozenset("gru".split()),
    "us": frozenset("dfw ewr iad lax ord sjc".split()),
}
ALIASES["usa"] = ALIASES["us"]
ANY = "any"


def describe(code: str, *, capacity: int) -> Region:
    """A region as `GET /v1/platform/regions` answers it; an operator's own code has no place on the map.

    What has hosts here is never deprecated, whatever became of the region of that name elsewhere: clients leave
    deprecated ones out. None has managed Postgres, which this version does not offer.
    """
    facts = BY_CODE.get(code) or RegionFacts(code, code, 0.0, 0.0, "", False)
    return Region(
        code=code,
        name=facts.name,
        latitude=facts.latitude,
        longitude=facts.longitude,
        gateway_available=facts.gateway,
        requires_paid_plan=False,
        deprecated=False,
        capacity=capacity,
        geo_region=facts.geo_region,
        mpg_available=False,
    )


def check(code: str, *, configured: Collection[str]) -> None:
    """Raises InvalidRequest for a code that is neither on the map nor the operators', with the three nearest."""
    if code in BY_CODE or code in configured:
        return
    known = sorted({*BY_CODE, *configured})
    place = ELSEWHERE.get(code)
    if place is not None:
        near = sorted(REGIONS, key=lambda region: _distance(place, (region.latitude, region.longitude)))[:3]
        told = ", ".join(f"{region.code} ({region.name})" for region in near)
    else:
        alike = sorted(known, key=lambda other: (_edits(code.lower(), other), other))[:3]
        told = ", ".join(f"{other} ({BY_CODE[other].name})" if other in BY_CODE else other for other in alike)
    raise InvalidRequest(f"there is no region {code!r}; the nearest that exist are {told}", field="region")


def _distance(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Of two places (latitude, longitude) as the angle between them; haversine."""
    (lat1, lon1), (lat2, lon2) = map(radians, one), map(radians, other)
    return asin(sqrt(sin((lat2 - lat1) / 2) ** 2 + cos(lat1) * cos(lat2) * sin((lon2 - lon1) / 2) ** 2))


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance, for codes whose place nobody knows."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        before, row[0] = row[0], number
        for column, wanted in enumerate(other, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (letter != wanted))
    return row[-1]


def expand(expression: str | None, *, here: Collection[str], default: str) -> Sequence[frozenset[str]]:
    """Sets of regions in order of preference: `iad,dfw` is two, `lhr,eu` one and then the rest of Europe.

    Nothing asked for means the default region first, then any other.
    """
    if not expression:
        return [frozenset({default}), frozenset(here)]
    preferences: list[frozenset[str]] = []
    for word in (piece.strip().lower() for piece in expression.split(",")):
        if word == ANY:
            preferences.append(frozenset(here))
        elif word in ALIASES:
            preferences.append(ALIASES[word])
        elif word in here or word in BY_CODE:
            preferences.append(frozenset({word}))
        else:
            check(word, configured=here)
    return preferences
