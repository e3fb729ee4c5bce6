"""Random requests, exits and crashes against one living agent: it settles, journal and driver agree, nothing leaks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anyio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pantala.domain.machine import PERSISTENT, State
from pantala.testing.agent import IMAGE, NodeFailure, World, config
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import Restart

IDS = ("aaaaaaaaaaaaa1", "aaaaaaaaaaaaa2")
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["create", "start", "stop", "restart", "update", "destroy", "crash", "exit", "breathe"]),
        st.sampled_from(IDS),
    ),
    max_size=16,
)


async def do(world: World, agent: Any, what: str, machine_id: str) -> None:
    match what:
        case "create":
            await agent.create(machine_id, config=config(restart=Restart(policy="on-failure")))
        case "start":
            await agent.do(node.StartMachine, machine_id)
        case "stop":
            await agent.do(node.StopMachine, machine_id)
        case "restart":
            await agent.do(node.RestartMachine, machine_id)
        case "update":
            await agent.do(node.UpdateMachine, machine_id, config=config(env={"V": "2"}), image=IMAGE)
        case "destroy":
            await agent.do(node.DestroyMachine, machine_id, force=True)
        case "crash" | "exit" if machine_id in world.driver.running():
            world.driver.crash(machine_id, exit_code=1 if what == "crash" else 0)
        case _:
            await anyio.sleep(0.002)


async def play(folder: Path, actions: list[tuple[str, str]]) -> None:
    world = World(folder)
    async with world.agent() as agent:
        for what, machine_id in actions:
            try:
                await do(world, agent, what, machine_id)
            except NodeFailure as failure:
                if failure.error.kind == "InternalError":
                    raise

        async def look() -> dict[str, tuple[str, bool]]:
            return {
                key: (str(task.record.state), bool(task.record.queued())) for key, task in agent.host.machines.items()
            }

        def settled(seen: dict[str, tuple[str, bool]]) -> bool:
            ready = all(state in PERSISTENT and not queued for state, queued in seen.values())
            return ready and {k for k, (state, _) in seen.items() if state == State.STARTED} == world.driver.running()

        seen = await until(look, settled, within_s=10, every_s=0.002)
        assert set(world.driver.machines) <= set(seen)
        assert set(world.network.plans) <= set(seen)
        for machine_id in seen:
            statuses = [e.type for e in (await agent.get(machine_id)).events]
            assert statuses.count("launch") <= 1
        for machine_id in list(seen):
            await agent.do(node.DestroyMachine, machine_id, force=True)
            await agent.wait("destroyed", machine_id=machine_id)
        assert world.driver.machines == {}
        assert world.network.plans == {}
        assert await agent.host.context.journal.open_steps() == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS)
def test_whatever_is_asked_it_settles_and_nothing_leaks(actions: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(play, Path(folder), actions)
