"""Scaling as a value: which machines to add and which to remove. Pure; `scale count` and `regions` print it, ask, and
give it to `deploys/scaling.py`.

COUNT is that of the whole group. Named regions are those that the group shall be in afterwards: machines elsewhere go,
and what is there is evened out, with as few changes as that takes (a stock flyctl starts at the first region instead
and never moves anything). Without regions nothing is moved: machines are added where fewest are, removed where most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from pantala.errors import InvalidRequest
from pantala.planner.deploy import group_of
from pantala.wire.machine import Machine

GONE = ("destroyed", "destroying")


class ScalePlan(msgspec.Struct, frozen=True, kw_only=True):
    """`add`: regions, one entry a new machine. `remove`: machine ids. `model`: the machine that is cloned. `before` and
    `after`: machines by region."""

    group: str
    add: list[str]
    remove: list[str]
    model: Machine
    before: dict[str, int]
    after: dict[str, int]

    @property
    def changes(self) -> bool:
        return bool(self.add or self.remove)

    def lines(self) -> list[str]:
        if not self.changes:
            return [f"{self.group}: nothing to do, {_places(self.before)}"]
        lines = [f"{self.group}: {_places(self.before)} -> {_places(self.after)}"]
        lines += [f"  + {number} in {region}" for region, number in sorted(Counter(self.add).items())]
        return lines + [f"  - destroy {machine}" for machine in self.remove]


def plan_scale(
    *, machines: Sequence[Machine], group: str, count: int, regions: Sequence[str], max_per_region: int | None = None
) -> ScalePlan:
    """From the group's machines to `count` of them. Raises InvalidRequest when there is nothing to clone, or when
    `max_per_region` leaves too little room."""
    present = _present(machines, group)
    if not present:
        raise InvalidRequest(
            f"there is no machine of the group {group!r} to clone", field="count", hint="run `pantala deploy` first"
        )
    if count < 0:
        raise InvalidRequest("must be 0 or more", field="count")
    before = Counter(machine.region for machine in present)
    wanted = list(dict.fromkeys(regions)) or sorted(before)
    limit = count if max_per_region is None else max_per_region
    if limit * len(wanted) < count:
        raise InvalidRequest(
            f"{limit} in each of {', '.join(wanted)} makes {limit * len(wanted)} machines, not {count}",
            field="max_per_region",
            hint="name more regions, or allow more in each",
        )
    after = _even(before, wanted, count) if regions else _grown(before, wanted, count)
    if max(after.values(), default=0) > limit:
        after = _even(before, wanted, count)
    return _plan(group, present, before, after)


def plan_add(*, machines: Sequence[Machine], group: str, regions: Sequence[str]) -> ScalePlan:
    """One machine in each named region that has none."""
    present = _present(machines, group)
    if not present:
        raise InvalidRequest(
            f"there is no machine of the group {group!r} to clone", field="region", hint="run `pantala deploy` first"
        )
    before = Counter(machine.region for machine in present)
    return _plan(group, present, before, before | Counter(dict.fromkeys(regions, 1)))


def plan_remove(*, machines: Sequence[Machine], group: str, regions: Sequence[str]) -> ScalePlan | None:
    """The group without the named regions; None when it has no machine. Raises InvalidRequest when none would stay."""
    present = _present(machines, group)
    if not present:
        return None
    before = Counter(machine.region for machine in present)
    after = Counter({region: number for region, number in before.items() if region not in regions})
    if not after:
        raise InvalidRequest(
            f"the group {group!r} would have no machine left",
            field="region",
            hint="add another region first, or `pantala scale count 0`",
        )
    return _plan(group, present, before, after)


# -- footnotes -------------------------------------------------------------------------------------------------------


def _present(machines: Sequence[Machine], group: str) -> list[Machine]:
    return [machine for machine in machines if group_of(machine) == group and machine.state not in GONE]


def _even(before: Mapping[str, int], wanted: Sequence[str], count: int) -> Counter[str]:
    """`count` over the wanted regions, differing by one at most; the odd ones stay where machines are."""
    base, odd = divmod(count, len(wanted))
    fullest_first = sorted(wanted, key=lambda region: (-before.get(region, 0), wanted.index(region)))
    return Counter({region: base + (index < odd) for index, region in enumerate(fullest_first)})


def _grown(before: Mapping[str, int], wanted: Sequence[str], count: int) -> Counter[str]:
    """One by one where fewest are, or off where most are."""
    after = Counter({region: before.get(region, 0) for region in wanted})
    while after.total() < count:
        after[min(wanted, key=lambda region: (after[region], wanted.index(region)))] += 1
    while after.total() > count:
        after[max(wanted, key=lambda region: (after[region], wanted.index(region)))] -= 1
    return after


def _plan(group: str, present: Sequence[Machine], before: Counter[str], after: Counter[str]) -> ScalePlan:
    after = +after
    remove: list[str] = []
    for region, surplus in sorted((before - after).items()):
        # Sleeping ones go first: nobody is using them.
        here = sorted((m for m in present if m.region == region), key=lambda m: (m.state == "started", m.id))
        remove += [machine.id for machine in here[:surplus]]
    kept = [machine for machine in present if machine.id not in remove and machine.config is not None]
    return ScalePlan(
        group=group,
        add=sorted((after - before).elements()),
        remove=remove,
        model=next(iter(kept), present[0]),
        before=dict(sorted(before.items())),
        after=dict(sorted(after.items())),
    )


def _places(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} in {region}" for region, number in counts.items()) or "none"
