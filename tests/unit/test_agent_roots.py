"""When the agent lets go of what a machine wrote to its root, and when it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.testing.agent import IMAGE, NodeFailure, World, config
from pantala.wire import node
from pantala.wire.machine import Guest, Restart, RootFS

pytestmark = pytest.mark.anyio
ID = "d8d9510a295118"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(
    ("kept", "after_stops", "after_an_update"),
    [("never", 3, 4), ("restart", 1, 2), ("always", 1, 1)],
)
async def test_a_root_lives_as_long_as_its_owner_said(
    world: World, kept: str, after_stops: int, after_an_update: int
) -> None:
    guest = Guest(persist_rootfs=kept)
    async with world.agent() as agent:
        await agent.create(config=config(services=[], guest=guest, restart=Restart(policy="no")))
        await agent.wait("started")
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        await agent.do(node.StartMachine)
        await agent.wait("started")
        world.driver.crash(ID, exit_code=1)
        await agent.until(lambda m: m.state == "stopped")
        await agent.do(node.StartMachine)
        await agent.wait("started")
        assert world.driver.roots_made[ID] == after_stops
    async with world.agent() as agent:
        changed = config(services=[], guest=guest, env={"V": "2"})
        updated = await agent.do(node.UpdateMachine, config=changed, image=IMAGE)
        await agent.wait("started", version=updated.instance_id)
        assert world.driver.roots_made[ID] == after_an_update
        await agent.do(node.DestroyMachine, force=True)
        await agent.wait("destroyed")
        assert await world.driver.list() == []


async def test_a_kept_root_outlives_a_reset_of_its_host(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=config(guest=Guest(persist_rootfs="restart")))
        await agent.wait("started")
    world.driver.machines.clear()
    world.network.plans.clear()
    async with world.agent() as agent:
        await agent.until(lambda m: m.state == "started" and world.driver.running() == {ID})
        assert world.driver.roots_made[ID] == 1


@pytest.mark.parametrize(
    ("had", "wanted", "refused"),
    [("always", "always", True), ("restart", "always", True), ("always", "restart", False), ("never", "always", False)],
)
async def test_a_root_that_goes_on_does_not_shrink(world: World, had: str, wanted: str, refused: bool) -> None:
    before = config(guest=Guest(persist_rootfs=had), rootfs=RootFS(size_gb=4))
    after = config(guest=Guest(persist_rootfs=wanted), rootfs=RootFS(size_gb=2))
    async with world.agent() as agent:
        await agent.create(config=before)
        await agent.wait("started")
        if not refused:
            await agent.do(node.UpdateMachine, config=after, image=IMAGE)
            return
        with pytest.raises(
            NodeFailure, match=r"config\.rootfs\.size_gb: 2 is less than the 4 of the root that is kept"
        ):
            await agent.do(node.UpdateMachine, config=after, image=IMAGE)
