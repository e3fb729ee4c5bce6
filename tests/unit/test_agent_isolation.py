"""What an agent tells of one machine alone: what isolates it, what it waits for; and no less isolation than asked."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from pantala.testing.agent import IMAGE, NodeFailure, World, config
from pantala.wire import node
from pantala.wire.machine import Guest

pytestmark = pytest.mark.anyio


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_one_machine_is_told_with_what_isolates_it_and_what_it_waits_for(world: World) -> None:
    async with world.agent() as agent:
        world.images.hold = anyio.Event()
        await agent.create()
        on_its_way = await agent.until(lambda m: m.progress is not None and m.progress.waits_for != "")
        assert on_its_way.progress is not None
        assert on_its_way.progress.asked_by == "user"
        assert on_its_way.progress.waits_for == f"pulling {config().image}"
        assert on_its_way.progress.stuck_at > on_its_way.progress.since
        world.images.hold.set()
        await agent.wait("started")
        there = await agent.get()
        assert there.progress is None
        assert there.isolation_details is not None
        assert there.isolation_details.driver == "fake"
        (listed,) = await agent.call(node.ListMachines())
        assert listed.isolation_details is None, "a list stays small"


async def test_stronger_isolation_than_the_hosts_is_refused(world: World) -> None:
    wanted = config(guest=Guest(isolation="vm"))
    async with world.agent() as agent:
        with pytest.raises(NodeFailure, match="isolation: vm is asked for, this host has none"):
            await agent.create(config=wanted)
        made = await agent.create()
        await agent.wait("started")
        with pytest.raises(NodeFailure, match="isolation: vm is asked for"):
            await agent.do(node.UpdateMachine, config=wanted, image=IMAGE)
        assert (await agent.get()).instance_id == made.instance_id
        with pytest.raises(NodeFailure, match="not one of container, vm"):
            await agent.create("d8d9510a295119", config=config(guest=Guest(isolation="metal")))
