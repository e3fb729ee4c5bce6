"""Other sizes for machines as a plan: CPUs and memory apart, within the limits, running machines one by one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.domain import guests
from pantala.errors import InvalidRequest
from pantala.planner.deploy import Update
from pantala.planner.resize import ResizePlan, plan_resize
from pantala.wire.machine import Guest, ImageRef, Machine, MachineConfig

PRESETS = st.sampled_from(sorted(guests.PRESETS))


def machine(name: str, *, state: str = "started", group: str = "app", guest: Guest | None = None) -> Machine:
    config = MachineConfig(image="i", guest=guest, env={"A": "1"}, metadata={"fly_process_group": group})
    return Machine(
        id=name, name=name, state=state, region="iad", instance_id="v", version="v", private_ip="", created_at="",
        updated_at="", image_ref=ImageRef(registry="r", repository="x"), events=[], checks=[], host_status="ok",
        cordoned=False, config=config,
    )  # fmt: skip


def after(plan: ResizePlan) -> set[tuple[str, int]]:
    return {(change.after.name, change.after.memory_mb) for change in plan.changes}


@pytest.mark.parametrize(
    ("before", "size", "wanted"),
    [
        (Guest(memory_mb=256), "performance-1x", ("performance-1x", 2048)),
        (Guest(memory_mb=1024), "shared-cpu-2x", ("shared-cpu-2x", 1024)),
        (Guest(memory_mb=256), "shared-cpu-4x", ("shared-cpu-4x", 1024)),
        (Guest(cpu_kind="performance", cpus=2, memory_mb=16384), "shared-cpu-1x", ("shared-cpu-1x", 2048)),
    ],
)
def test_other_cpus_keep_the_memory_as_far_as_they_may_have_it(
    before: Guest, size: str, wanted: tuple[str, int]
) -> None:
    assert after(plan_resize(machines=[machine("m1", guest=before)], group=None, size=size)) == {wanted}


def test_other_memory_keeps_the_cpus() -> None:
    present = [machine("m1", guest=Guest(cpus=2, memory_mb=512))]
    assert after(plan_resize(machines=present, group=None, memory_mb=4096)) == {("shared-cpu-2x", 4096)}
    with pytest.raises(InvalidRequest, match="For shared VMs with 2 CPUs, 4352MiB of memory is too high"):
        plan_resize(machines=present, group=None, memory_mb=4352)


@given(PRESETS, PRESETS)
def test_a_resized_machine_is_always_one_that_may_be(before: str, size: str) -> None:
    old = guests.preset(before, field="size")
    guest = Guest(cpu_kind=old.cpu_kind, cpus=old.cpus, memory_mb=old.memory_mb)
    for change in plan_resize(machines=[machine("m1", guest=guest)], group=None, size=size).changes:
        assert guests.resolve(change.config).name == size


def test_running_machines_go_one_by_one_and_sleeping_ones_sleep_on() -> None:
    present = [machine("m1"), machine("m2", state="stopped"), machine("m3"), machine("m4", guest=Guest(memory_mb=512))]
    wanted = plan_resize(machines=present, group=None, memory_mb=512)
    assert (wanted.settled, wanted.lines()[0]) == (1, "app: 1 machine already of that size")
    waves = wanted.plan({"fly_release_version": "2"}).waves
    updates = [[action for action in wave.actions if isinstance(action, Update)] for wave in waves]
    assert [[(u.machine_id, u.warm) for u in part] for part in updates] == [
        [("m1", True)],
        [("m3", True)],
        [("m2", False)],
    ]
    assert [wave.check for wave in waves] == [True, True, False]
    config = updates[0][0].config
    assert (config.env, config.image) == ({"A": "1"}, "i")
    assert config.metadata == {"fly_process_group": "app", "fly_release_version": "2"}


def test_a_group_has_to_be_named_where_there_are_several() -> None:
    present = [machine("m1"), machine("m2", group="worker")]
    with pytest.raises(InvalidRequest, match="requires specifying a group with '--group <name>'") as caught:
        plan_resize(machines=present, group=None, memory_mb=512)
    assert "app, worker" in (caught.value.hint or "")
    wanted = plan_resize(machines=present, group="worker", memory_mb=512)
    assert [change.machine_id for change in wanted.changes] == ["m2"]
    with pytest.raises(InvalidRequest, match="No active machines in process group 'cron'"):
        plan_resize(machines=present, group="cron", memory_mb=512)


def test_a_machine_that_nobody_can_reach_stays_as_it_is() -> None:
    lost = msgspec.structs.replace(machine("m2"), config=None, incomplete_config=MachineConfig())
    wanted = plan_resize(machines=[machine("m1"), lost], group="app", memory_mb=512)
    assert [change.machine_id for change in wanted.changes] == ["m1"]
    assert wanted.lines()[-1] == "app: m2 is not in reach and stays as it is"
