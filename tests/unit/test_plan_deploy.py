"""A deploy's plan, as flyctl orders its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import InvalidRequest
from pantala.planner.deploy import Create, Destroy, Plan, Update, Wanted, at_once, plan_deploy
from pantala.wire.machine import ImageRef, Machine, MachineConfig, Service

OLD = MachineConfig(image="old")
NEW = MachineConfig(image="new", services=[Service(internal_port=8080)])


def machine(
    name: str, state: str = "started", *, group: str = "app", region: str = "iad", managed: bool = True
) -> Machine:
    metadata = {"fly_platform_version": "v2", "fly_process_group": group} if managed else {}
    return Machine(
        id=name, name=name, state=state, region=region, instance_id="v", version="v", private_ip="", created_at="",
        updated_at="", image_ref=ImageRef(registry="r", repository="x"), events=[], checks=[], host_status="ok",
        cordoned=False, config=MachineConfig(image="old", metadata=metadata),
    )  # fmt: skip


def plan(machines: list[Machine], *, strategy: str = "rolling", max_unavailable: float = 0.33, ha: bool = True) -> Plan:
    return plan_deploy(
        machines=machines,
        wanted=[Wanted(group="app", config=NEW)],
        primary_region="iad",
        strategy=strategy,
        max_unavailable=max_unavailable,
        high_availability=ha,
    )


def waves(result: Plan) -> list[list[str]]:
    return [[a.machine_id for a in wave.actions if isinstance(a, Update)] for wave in result.waves]


@pytest.mark.parametrize(("ha", "count"), [(True, 2), (False, 1)])
def test_a_first_deploy_makes_two_machines_for_a_group_with_services(ha: bool, count: int) -> None:
    actions = plan([], ha=ha).waves[0].actions
    assert [a.region for a in actions if isinstance(a, Create)] == ["iad"] * count


def test_running_machines_go_one_first_then_a_third_at_once() -> None:
    names = [f"m{i}" for i in range(7)]
    assert waves(plan([machine(n) for n in names])) == [["m0"], ["m1", "m2", "m3"], ["m4", "m5", "m6"]]


def test_a_sleeping_fleet_has_one_spearhead_and_the_rest_is_not_started() -> None:
    result = plan([machine(f"m{i}", "stopped") for i in range(3)])
    first = result.waves[0].actions[0]
    assert isinstance(first, Update)
    assert (first.spearhead, first.warm) == (True, False)
    rest = [a for wave in result.waves[1:] for a in wave.actions if isinstance(a, Update)]
    assert [(a.spearhead, a.warm) for a in rest] == [(False, False)] * 2


def test_machines_of_other_makers_are_left_alone_and_removed_groups_destroyed() -> None:
    result = plan([machine("mine"), machine("theirs", managed=False), machine("gone", group="old")])
    destroyed = [a.machine_id for wave in result.waves for a in wave.actions if isinstance(a, Destroy)]
    assert destroyed == ["gone"]
    assert "theirs" not in [name for wave in waves(result) for name in wave]


@pytest.mark.parametrize("strategy", ["canary", "bluegreen"])
def test_strategies_that_do_not_exist_yet_are_refused(strategy: str) -> None:
    with pytest.raises(InvalidRequest, match=r"deploy\.strategy"):
        plan([], strategy=strategy)


@given(
    st.lists(st.sampled_from(["started", "stopped", "suspended", "failed", "created", "starting"]), max_size=20),
    st.floats(0.01, 5),
    st.sampled_from(["rolling", "immediate"]),
)
def test_every_machine_is_updated_exactly_once(states: list[str], unavailable: float, strategy: str) -> None:
    machines = [machine(f"m{i:02}", state) for i, state in enumerate(states)]
    result = plan(machines, strategy=strategy, max_unavailable=unavailable)
    updated = [name for wave in waves(result) for name in wave]
    assert sorted(updated) == sorted(m.id for m in machines)
    if strategy == "rolling":
        warm = sum(m.state in ("started", "starting") for m in machines)
        for wave in result.waves:
            assert sum(isinstance(a, Update) and a.warm for a in wave.actions) <= at_once(warm, unavailable)
