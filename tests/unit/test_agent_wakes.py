"""An agent on fakes: machines that sleep are prepared, and a request wakes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from pantala.agent.wakes import Wakes
from pantala.testing.agent import RunningAgent, World, config, service
from pantala.testing.driver import Behaviour
from pantala.testing.killing import KillingJournal
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import Restart

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def prepared(agent: RunningAgent) -> None:
    """The agent knows, and has written, that it is."""

    async def look() -> str:
        return agent.host.machines[ID].record.runtime

    await until(look, lambda phase: phase == "prepared", within_s=15, every_s=0.005)


async def asleep(agent: RunningAgent, world: World) -> None:
    await agent.create()
    await agent.wait("started")
    await agent.do(node.StopMachine)
    await agent.wait("stopped")
    await prepared(agent)


async def test_a_stopped_machine_is_prepared_so_that_a_wake_is_one_write_and_one_message(world: World) -> None:
    async with world.agent() as agent:
        await asleep(agent, world)
        before = agent.host.context.journal.commits
        seen: list[int] = []
        original = world.driver.start

        async def start(machine_id: str, start: object) -> int:
            seen.append(agent.host.context.journal.commits - before)
            return await original(machine_id, start)  # pyright: ignore[reportArgumentType]

        world.driver.start = start  # the recorded message is the driver's own
        result = await Wakes(agent.host).wake(ID, 5)
        assert result.ok
        assert result.ip4.startswith("10.213.")
        assert seen == [1]
        await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["passing"] == [True])


async def test_a_stopped_machine_waits_for_its_turn_to_be_prepared_and_a_start_does_not(world: World) -> None:
    async with world.agent() as agent:
        turns = agent.host.context.preparing
        await turns.acquire()
        await agent.create(skip_launch=True)
        await agent.wait("stopped")
        await until(waits_for(turns), lambda waiting: waiting == 1, within_s=15, every_s=0.005)
        assert world.driver.running() == set()
        await agent.do(node.StartMachine)
        await agent.wait("started")
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        await until(waits_for(turns), lambda waiting: waiting == 1, within_s=15, every_s=0.005)
        turns.release()
        await prepared(agent)


def waits_for(turns: anyio.Semaphore) -> Callable[[], Awaitable[int]]:
    async def look() -> int:
        return turns.statistics().tasks_waiting

    return look


async def test_a_request_that_boots_it_waits_for_one_write(world: World) -> None:
    """The second one never ends, and the request is answered all the same."""

    def dies_late(journal: Any) -> KillingJournal:
        killing.append(KillingJournal(journal, at=10_000, after_write=False))
        return killing[0]

    killing: list[KillingJournal] = []
    async with world.agent(dies_late) as agent:
        await asleep(agent, world)
        killing[0].stop_at(killing[0].count + 2)
        result = await Wakes(agent.host).wake(ID, 5)
        assert (result.ok, bool(result.ip4)) == (True, True), result


async def test_many_wakes_are_one_start(world: World) -> None:
    async with world.agent() as agent:
        await asleep(agent, world)
        results: list[bool] = []

        async def wake() -> None:
            results.append((await Wakes(agent.host).wake(ID, 5)).ok)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(wake)
        assert results == [True] * 20
        assert world.driver.starts[ID] == 2


async def test_a_prepared_machine_that_died_is_prepared_again_by_the_wake(world: World) -> None:
    async with world.agent() as agent:
        await asleep(agent, world)
        world.driver.crash(ID)
        assert (await Wakes(agent.host).wake(ID, 5)).ok


@pytest.mark.parametrize(
    ("why", "code", "words"),
    [
        ("gone", "PM08", "not on this host"),
        ("no autostart", "PM08", "no autostart"),
        ("cordoned", "PM08", "cordoned"),
        ("full", "PM07", "could not reserve"),
        ("never ready", "PM03", "bind 0.0.0.0:8080"),
        ("ends", "PM07", "exited with code 3"),
    ],
)
async def test_a_wake_that_cannot_be_says_why(world: World, why: str, code: str, words: str) -> None:
    async with world.agent() as agent:
        wakes = Wakes(agent.host)
        if why != "gone":
            await agent.create(
                skip_launch=True,
                config=config(services=[service(autostart=why != "no autostart")], restart=Restart(policy="no")),
                cordoned=why == "cordoned",
            )
            await agent.wait("stopped")
        if why == "full":
            agent.host.capacity = msgspec.structs.replace(agent.host.capacity, memory_mib=0)
        if why == "never ready":
            world.driver.behaviour = Behaviour(listens=(("127.0.0.1", 8080),))
        if why == "ends":
            world.driver.behaviour = Behaviour(exits_with=3, listens=())
        result = await wakes.wake(ID, 0.5 if why == "never ready" else 5)
        assert not result.ok
        assert result.elsewhere
        assert (result.code, words in result.reason) == (code, True), result.reason
