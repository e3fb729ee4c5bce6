"""Containers as a caller of the node API sees them: their images, their states, their history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pantala.testing.agent import IMAGE, NodeFailure, World
from pantala.wire import node
from pantala.wire.guest import CheckState, ContainerState
from pantala.wire.machine import Container, ContainerStatus, ImageRef, Machine, MachineConfig, OtherImage

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"
SIDE = ImageRef(registry="registry.test", repository="side", tag="v1", digest="sha256:" + "2" * 64)
CONFIG = MachineConfig(
    containers=[
        Container(name="web", image="registry.test/hello:deployment-1"),
        Container(name="side", image="side:v1"),
    ]
)
OTHERS = {"side:v1": OtherImage(image=SIDE)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_every_image_is_there_before_anything_is_made(world: World) -> None:
    world.images.missing = {"side"}
    async with world.agent() as agent:
        await agent.create(config=CONFIG, other_images=OTHERS)
        await agent.until(lambda machine: machine.state == "launch_failed")
        assert world.driver.machines == {}


async def test_each_has_its_root_and_its_image_is_kept(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=CONFIG, other_images=OTHERS)
        await agent.wait("started")
        made = world.driver.machines[ID]
        assert [(one.name, one.layers[0].name) for one in made.spec.containers] == [
            ("web", IMAGE.digest),
            ("side", SIDE.digest),
        ]
        assert made.start is not None
        assert [one.name for one in made.start.containers] == ["web", "side"]
        machine = await agent.until(lambda machine: (machine.containers or [])[0].state == "started")
        assert (machine.image_ref, machine.other_images) == (IMAGE, {"side:v1": SIDE})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"config": CONFIG, "other_images": OTHERS}, "container: there is no 'db'; the machine has web, side"),
        ({}, "container: there is no 'db'; the machine has no containers"),
    ],
    ids=["others", "none"],
)
async def test_a_command_for_a_container_that_is_not_there_is_the_callers_mistake(
    world: World, changes: dict[str, Any], told: str
) -> None:
    async with world.agent() as agent:
        await agent.create(**changes)
        await agent.wait("started")
        with pytest.raises(NodeFailure, match=told) as caught:
            await agent.do(node.ExecMachine, argv=["ls"], container="db")
        assert caught.value.error.http_code == 400


async def test_their_states_and_checks_are_the_machines_and_changes_its_history(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=CONFIG, other_images=OTHERS)
        await agent.wait("started")
        failing = CheckState(name="up", kind="readiness", passing=False, output="refused")
        world.driver.contained[ID] = [
            ContainerState(name="web", state="started", health="unhealthy", checks=[failing]),
            ContainerState(name="side", state="restarting", restarts=1, exit_code=3),
        ]

        def has_both(machine: Machine) -> bool:
            said = [event.request.reason for event in machine.events if event.request]
            return {
                "container web is unhealthy: up",
                "container side exited with code 3; it is started again",
            } <= set(said)

        machine = await agent.until(has_both)
        assert machine.containers == [
            ContainerStatus(name="web", state="started", health="unhealthy"),
            ContainerStatus(name="side", state="restarting", exit_code=3, restarts=1),
        ]
        assert [(one.name, one.status, one.output) for one in machine.checks] == [
            ("container-web-up", "critical", "refused")
        ]
