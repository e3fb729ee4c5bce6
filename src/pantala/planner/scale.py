"""`scale count` as a value: which machines to add and which to remove, evenly over regions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pantala.errors import InvalidRequest
from pantala.planner.deploy import group_of
from pantala.wire.machine import Machine


class ScalePlan(msgspec.Struct, frozen=True, kw_only=True):
    """`add`: regions, one entry a new machine. `remove`: machine ids. `model`: the machine that is cloned."""

    group: str
    add: list[str]
    remove: list[str]
    model: Machine

    def lines(self) -> list[str]:
        if not self.add and not self.remove:
            return [f"{self.group}: nothing to do"]
        lines = [f"{self.group}: add 1 machine in {region}" for region in self.add]
        return lines + [f"{self.group}: destroy {machine}" for machine in self.remove]


def plan_scale(
    *, machines: Sequence[Machine], group: str, count: int, regions: Sequence[str], primary_region: str
) -> ScalePlan:
    """From the group's machines to `count` of them, spread evenly over `regions` (default: those in use)."""
    present = [m for m in machines if group_of(m) == group and m.state not in ("destroyed", "destroying")]
    if not present:
        raise InvalidRequest(
            f"there is no machine of the group {group!r} to clone", field="count", hint="run `pantala deploy` first"
        )
    if count < 0:
        raise InvalidRequest("must be 0 or more", field="count")
    wanted_regions = list(dict.fromkeys(regions)) or sorted({m.region for m in present} or {primary_region})
    counts = {region: sum(m.region == region for m in present) for region in wanted_regions}
    add: list[str] = []
    for _ in range(count - len(present)):
        region = min(wanted_regions, key=lambda r: (counts[r], wanted_regions.index(r)))
        counts[region] += 1
        add.append(region)
    return ScalePlan(group=group, add=add, remove=_surplus(present, count, wanted_regions), model=present[0])


def _surplus(present: Sequence[Machine], count: int, regions: Sequence[str]) -> list[str]:
    """Whom to remove: outside the wanted regions first, then from the fullest; sleeping before running."""
    remaining = list(present)
    removed: list[str] = []
    while len(remaining) > count:
        load = {m.region: sum(other.region == m.region for other in remaining) for m in remaining}
        victim = max(remaining, key=lambda m: (m.region not in regions, load[m.region], m.state != "started", m.id))
        remaining.remove(victim)
        removed.append(victim.id)
    return removed
