"""An agent on fakes, through the node API: what a caller sees of a machine's life."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.testing.agent import World
from pantala.wire import node

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_create_launches_and_the_machine_becomes_routable(world: World) -> None:
    async with world.agent() as agent:
        created = await agent.create()
        assert created.state == "created"
        await agent.wait("started")
        machine = await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["passing"] == [True])
        assert machine.private_ip.startswith("fdaa:0:18:")
        assert [(e.type, e.status) for e in reversed(machine.events)] == [
            ("launch", "created"),
            ("start", "starting"),
            ("start", "started"),
        ]
        start = world.driver.machines[ID].start
        assert start is not None
        assert start.argv == ["/bin/app", "serve"]
        assert start.env["FLY_MACHINE_VERSION"] == machine.instance_id


async def test_stop_start_destroy(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        exited = next(e for e in (await agent.get()).events if e.type == "exit")
        assert exited.request is not None
        assert exited.request.exit_event is not None
        assert exited.request.exit_event.requested_stop
        assert (await agent.do(node.StartMachine)).previous_state == "stopped"
        await agent.wait("started")
        await agent.do(node.DestroyMachine, force=True)
        await agent.wait("destroyed")
        assert world.driver.machines == {}
        assert world.network.plans == {}
        assert world.rows.rows == {}
        assert (await agent.get()).state == "destroyed"
