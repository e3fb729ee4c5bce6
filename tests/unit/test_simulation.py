"""Simulated placements: regions in order, weights, counts that never exceed what fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import CapacityError
from pantala.planner import simulation
from pantala.planner.placement import Ask, Candidate, Fleet


def node(name: str, region: str, memory_mib: int) -> Candidate:
    return Candidate(
        id=name,
        region=region,
        zone="a",
        reachable=True,
        draining=False,
        isolation="vm",
        cpus_free=64.0,
        memory_mib=memory_mib,
        memory_mib_free=memory_mib,
        disk_mib_free=10_000,
        orgs=frozenset(),
    )


def ask(*regions: set[str]) -> Ask:
    return Ask(org=1, regions=[frozenset(one) for one in regions], cpus=1, shared_cpu=True, memory_mib=256)


def fleet() -> Fleet:
    return Fleet([node("n1", "iad", 512), node("n2", "iad", 512), node("n3", "lhr", 1024)])


def told(found: list[simulation.Simulated]) -> list[tuple[str, int, int]]:
    return [(one.region, one.machines, one.nodes) for one in found]


def test_the_first_region_is_filled_before_the_next() -> None:
    assert told(simulation.place(fleet(), ask({"iad"}, {"lhr"}), count=3)) == [("iad", 3, 2)]
    assert told(simulation.place(fleet(), ask({"iad"}, {"lhr"}), count=6)) == [("iad", 4, 2), ("lhr", 2, 1)]


def test_spread_counts_more_than_the_region_when_it_weighs_more() -> None:
    found = simulation.place(fleet(), ask({"iad"}, {"lhr"}), count=4, region_weight=0, spread_weight=10)
    assert told(found) == [("iad", 2, 2), ("lhr", 2, 1)]


def test_regions_of_one_set_are_equal() -> None:
    assert told(simulation.place(fleet(), ask({"iad", "lhr"}), count=2)) == [("iad", 1, 1), ("lhr", 1, 1)]


def test_more_than_fits_is_no_capacity() -> None:
    with pytest.raises(CapacityError, match="memory"):
        simulation.place(fleet(), ask({"iad"}, {"lhr"}), count=9)


def test_room_of_each_region_by_itself() -> None:
    assert told(simulation.room(fleet(), ask({"lhr"}, {"iad", "nrt"}), limit=100)) == [("lhr", 4, 1), ("iad", 4, 2)]
    assert told(simulation.room(fleet(), ask({"lhr"}, {"iad"}), limit=1)) == [("lhr", 1, 1), ("iad", 1, 1)]


@given(count=st.integers(min_value=1, max_value=8), region=st.integers(0, 100), spread=st.integers(0, 100))
def test_all_are_placed_or_none(count: int, region: int, spread: int) -> None:
    found = simulation.place(fleet(), ask({"iad"}, {"lhr"}), count=count, region_weight=region, spread_weight=spread)
    assert sum(one.machines for one in found) == count
    assert all(one.machines <= 4 for one in found)
