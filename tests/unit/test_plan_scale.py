"""Scaling over regions as a plan: where machines go to, and which go away."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import InvalidRequest
from pantala.planner.scale import ScalePlan, plan_add, plan_remove, plan_scale
from pantala.wire.machine import ImageRef, Machine, MachineConfig

PLACES = st.lists(st.sampled_from(["iad", "lhr", "nrt"]), min_size=1, max_size=9)


def machine(name: str, region: str, state: str = "started") -> Machine:
    return Machine(
        id=name, name=name, state=state, region=region, instance_id="v", version="v", private_ip="", created_at="",
        updated_at="", image_ref=ImageRef(registry="r", repository="x"), events=[], checks=[], host_status="ok",
        cordoned=False, config=MachineConfig(image="old"),
    )  # fmt: skip


def fleet(*regions: str) -> list[Machine]:
    return [machine(f"m{number}", region) for number, region in enumerate(regions)]


def scale(machines: list[Machine], count: int, *regions: str, max_per_region: int | None = None) -> ScalePlan:
    return plan_scale(machines=machines, group="app", count=count, regions=regions, max_per_region=max_per_region)


def after(machines: list[Machine], plan: ScalePlan) -> Counter[str]:
    kept = Counter(m.region for m in machines if m.id not in plan.remove)
    return kept + Counter(plan.add)


def test_three_over_three_regions_after_a_first_deploy_is_one_in_each() -> None:
    machines = fleet("iad", "iad")
    plan = scale(machines, 3, "iad", "lhr", "nrt")
    assert after(machines, plan) == {"iad": 1, "lhr": 1, "nrt": 1}
    assert plan.lines() == [
        "app: 2 in iad -> 1 in iad, 1 in lhr, 1 in nrt",
        "  + 1 in lhr",
        "  + 1 in nrt",
        "  - destroy m0",
    ]


def test_machines_outside_the_named_regions_go() -> None:
    machines = fleet("iad", "iad", "nrt")
    plan = scale(machines, 2, "nrt", "lhr")
    assert after(machines, plan) == {"nrt": 1, "lhr": 1}


def test_a_sleeping_machine_goes_before_one_that_serves() -> None:
    machines = [machine("a", "iad"), machine("b", "iad", "stopped"), machine("c", "iad")]
    assert scale(machines, 2).remove == ["b"]


def test_without_regions_nothing_is_moved() -> None:
    machines = fleet("iad", "iad", "iad", "lhr")
    assert not scale(machines, 4).changes
    assert scale(machines, 5).add == ["lhr"]


def test_a_bound_per_region_moves_what_is_above_it() -> None:
    machines = fleet("iad", "iad", "lhr")
    plan = scale(machines, 3, "iad", "lhr", "nrt", max_per_region=1)
    assert set(after(machines, plan).values()) == {1}


def test_a_bound_that_leaves_too_little_room_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="makes 2 machines, not 3"):
        scale(fleet("iad"), 3, "iad", "lhr", max_per_region=1)


@given(st.integers(0, 12), PLACES, st.lists(st.sampled_from(["iad", "lhr", "nrt", "syd"]), max_size=4, unique=True))
def test_scaling_ends_at_the_count_evenly_and_with_few_changes(
    count: int, present: list[str], regions: list[str]
) -> None:
    machines = fleet(*present)
    plan = scale(machines, count, *regions)
    ends = after(machines, plan)
    assert ends.total() == count
    assert ends == plan.after
    if regions:
        assert set(ends) <= set(regions)
        assert max(ends.values(), default=0) - min((ends[region] for region in regions), default=0) <= 1
        assert not {m.region for m in machines if m.id in plan.remove} & set(plan.add)
    else:
        assert not (plan.add and plan.remove)


def test_adding_regions_fills_only_those_that_have_none() -> None:
    machines = fleet("iad", "iad", "lhr")
    assert plan_add(machines=machines, group="app", regions=["lhr", "nrt"]).add == ["nrt"]


def test_removing_a_region_destroys_its_machines_but_never_the_last() -> None:
    machines = fleet("iad", "lhr", "lhr")
    plan = plan_remove(machines=machines, group="app", regions=["lhr"])
    assert plan is not None
    assert plan.remove == ["m1", "m2"]
    assert not plan.add
    with pytest.raises(InvalidRequest, match="no machine left"):
        plan_remove(machines=machines, group="app", regions=["lhr", "iad"])
    assert plan_remove(machines=machines, group="worker", regions=["lhr"]) is None
