"""Where machines would go if they were asked for now. Pure: nothing is reserved, the fleet that is given is changed.

Called by `control/placements.py` for `POST /v1/platform/placements`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pantala.errors import CapacityError
from pantala.planner.placement import Ask, Fleet

REGION_WEIGHT, SPREAD_WEIGHT = 50, 1


class Simulated(NamedTuple):
    """`machines` of a region, on `nodes` different hosts."""

    region: str
    machines: int
    nodes: int


def place(
    fleet: Fleet, ask: Ask, *, count: int, region_weight: int = REGION_WEIGHT, spread_weight: int = SPREAD_WEIGHT
) -> list[Simulated]:
    """`count` machines, each where most speaks for it: `region_weight` for a region of the set named first,
    proportionally less for later sets, less `spread_weight` for each machine that the region has got. In the order in
    which regions are preferred; those that get none are left out. Raises CapacityError when not all have room."""
    preference = _preferences(ask.regions, region_weight)
    got: dict[str, dict[str, int]] = {}
    full: set[str] = set()
    for _ in range(count):
        while True:
            open_regions = [region for region in preference if region not in full]
            if not open_regions:
                fleet.choose(ask)  # says why nothing fits
                raise CapacityError("no region has room for all of them")
            best = max(
                open_regions,
                key=lambda region: preference[region] - spread_weight * sum(got.get(region, {}).values()),
            )
            if _place_one(fleet, ask, best, got.setdefault(best, {})):
                break
            full.add(best)
    return [Simulated(region, sum(got[region].values()), len(got[region])) for region in preference if got.get(region)]


def room(fleet: Fleet, ask: Ask, *, limit: int) -> list[Simulated]:
    """How many would fit in each region by itself, at most `limit`; those without room are left out."""
    found: list[Simulated] = []
    for region in _preferences(ask.regions, 1):
        nodes: dict[str, int] = {}
        while sum(nodes.values()) < limit and _place_one(fleet, ask, region, nodes):
            pass
        if nodes:
            found.append(Simulated(region, sum(nodes.values()), len(nodes)))
    return found


def _place_one(fleet: Fleet, ask: Ask, region: str, nodes: dict[str, int]) -> bool:
    here = msgspec.structs.replace(ask, regions=[frozenset({region})], present={**ask.present, **nodes})
    try:
        node = fleet.choose(here)
    except CapacityError:
        return False
    fleet.take(node.id, here)
    nodes[node.id] = nodes.get(node.id, 0) + 1
    return True


def _preferences(sets: Sequence[frozenset[str]], weight: int) -> dict[str, float]:
    """Each region once, by the first set that names it; most preferred first, then by code."""
    found: dict[str, float] = {}
    for number, regions in enumerate(sets):
        for region in sorted(regions):
            found.setdefault(region, weight * (len(sets) - number) / len(sets))
    return found
