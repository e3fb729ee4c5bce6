"""Region codes: airport codes with names and places, the aliases of groups of them, and expressions over both.

Codes and coordinates are public facts (IATA); which of them this cluster has is `ControlSettings.regions`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
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
    deprecated: bool
    databases: bool


REGIONS = (
    RegionFacts("ams", "Amsterdam, Netherlands", 52.309, 4.764, "europe", True, False, True),
    RegionFacts("arn", "Stockholm, Sweden", 59.652, 17.919, "europe", True, False, False),
    RegionFacts("atl", "Atlanta, Georgia (US)", 33.637, -84.428, "north_america", False, True, False),
    RegionFacts("bog", "Bogota, Colombia", 4.702, -74.147, "south_america", False, True, False),
    RegionFacts("bom", "Mumbai, India", 19.089, 72.868, "asia_pacific", True, False, False),
    RegionFacts("bos", "Boston, Massachusetts (US)", 42.364, -71.005, "north_america", False, True, False),
    RegionFacts("cdg", "Paris, France", 49.01, 2.548, "europe", True, False, False),
    RegionFacts("den", "Denver, Colorado (US)", 39.862, -104.673, "north_america", False, True, False),
    RegionFacts("dfw", "Dallas, Texas (US)", 32.897, -97.038, "north_america", True, False, False),
    RegionFacts("ewr", "Secaucus, NJ (US)", 40.69, -74.175, "north_america", True, False, False),
    RegionFacts("eze", "Ezeiza, Argentina", -34.822, -58.536, "south_america", False, True, False),
    RegionFacts("fra", "Frankfurt, Germany", 50.033, 8.571, "europe", True, False, True),
    RegionFacts("gdl", "Guadalajara, Mexico", 20.522, -103.311, "north_america", False, True, False),
    RegionFacts("gig", "Rio de Janeiro, Brazil", -22.81, -43.251, "south_america", False, True, False),
    RegionFacts("gru", "Sao Paulo, Brazil", -23.432, -46.47, "south_america", False, False, True),
    RegionFacts("hkg", "Hong Kong, Hong Kong", 22.309, 113.915, "asia_pacific", False, True, False),
    RegionFacts("iad", "Ashburn, Virginia (US)", 38.945, -77.456, "north_america", True, False, True),
    RegionFacts("jnb", "Johannesburg, South Africa", -26.139, 28.246, "africa", False, False, False),
    RegionFacts("lax", "Los Angeles, California (US)", 33.942, -118.408, "north_america", True, False, True),
    RegionFacts("lhr", "London, United Kingdom", 51.471, -0.462, "europe", True, False, True),
    RegionFacts("mad", "Madrid, Spain", 40.472, -3.561, "europe", False, True, False),
    RegionFacts("mia", "Miami, Florida (US)", 25.793, -80.291, "north_america", False, True, False),
    RegionFacts("nrt", "Tokyo, Japan", 35.765, 140.386, "asia_pacific", True, False, True),
    RegionFacts("ord", "Chicago, Illinois (US)", 41.979, -87.905, "north_america", True, False, True),
    RegionFacts("otp", "Bucharest, Romania", 44.571, 26.085, "europe", False, True, False),
    RegionFacts("phx", "Phoenix, Arizona (US)", 33.434, -112.012, "north_america", False, True, False),
    RegionFacts("qro", "Queretaro, Mexico", 20.617, -100.186, "north_america", False, True, False),
    RegionFacts("scl", "Santiago, Chile", -33.393, -70.786, "south_america", False, True, False),
    RegionFacts("sea", "Seattle, Washington (US)", 47.45, -122.309, "north_america", False, True, False),
    RegionFacts("sin", "Singapore, Singapore", 1.35, 103.994, "asia_pacific", True, False, True),
    RegionFacts("sjc", "San Jose, California (US)", 37.363, -121.929, "north_america", True, False, True),
    RegionFacts("syd", "Sydney, Australia", -33.946, 151.177, "asia_pacific", True, False, True),
    RegionFacts("waw", "Warsaw, Poland", 52.166, 20.967, "europe", False, True, False),
    RegionFacts("yul", "Montreal, Canada", 45.471, -73.741, "north_america", False, True, False),
    RegionFacts("yyz", "Toronto, Canada", 43.677, -79.631, "north_america", True, False, True),
)
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
    """A region as `GET /v1/platform/regions` answers it; an operator's own code has no place on the map."""
    facts = BY_CODE.get(code) or RegionFacts(code, code, 0.0, 0.0, "", False, False, False)
    return Region(
        code=code,
        name=facts.name,
        latitude=facts.latitude,
        longitude=facts.longitude,
        gateway_available=facts.gateway,
        requires_paid_plan=False,
        deprecated=facts.deprecated,
        capacity=capacity,
        geo_region=facts.geo_region,
        mpg_available=facts.databases,
    )


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
            near = get_close_matches(word, [*here, *BY_CODE, *ALIASES], n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise InvalidRequest(
                f"unknown region {word!r}; this cluster has {', '.join(here)}", field="region", hint=hint
            )
    return preferences
