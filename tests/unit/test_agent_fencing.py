"""A machine that was placed elsewhere, or whose host left the cluster, never runs here again, whatever comes.

Seeded like `test_agent_crash.py`; `PANTALA_KILL_RUNS` sets how many histories are tried.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from pantala.agent.fencing import Fencing
from pantala.agent.wakes import Wakes
from pantala.catalogue import View
from pantala.domain.machine import TERMINAL, State
from pantala.journal import Journal
from pantala.testing.agent import IMAGE, NodeFailure, RunningAgent, World, config
from pantala.testing.killing import KillingJournal
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.catalogue import OwnedRow
from pantala.wire.machine import Restart

pytestmark = pytest.mark.anyio

RUNS = max(int(os.environ.get("PANTALA_KILL_RUNS", "500")) // 10, 10)
ID = "d8d9510a295118"
ALWAYS = config(restart=Restart(policy="always"))


async def gone(agent: RunningAgent, world: World) -> None:
    """Nothing of the machine is left here, and its history says why."""
    await until(lambda: nothing_left(agent, world), lambda left: not left, within_s=10, every_s=0.005)
    record = await agent.host.find_record(ID)
    assert record.state in TERMINAL


async def nothing_left(agent: RunningAgent, world: World) -> str:
    found = [*world.driver.machines, *world.network.plans, *agent.host.machines]
    rows = [key for _, key in world.rows.rows if key.startswith(("m/", "svc/"))]
    steps = await agent.host.context.journal.open_steps()
    return " ".join(map(str, [*found, *rows, *steps]))


async def everything_that_starts(agent: RunningAgent) -> None:
    """Every door by which a machine could be made to run."""
    calls: list[Callable[[], object]] = [
        lambda: agent.do(node.StartMachine),
        lambda: agent.do(node.RestartMachine),
        lambda: agent.do(node.UpdateMachine, config=ALWAYS, image=IMAGE),
        lambda: agent.create(config=ALWAYS, request_id="again"),
        lambda: agent.do(node.PublishMachine, generation=1),
    ]
    for call in calls:
        with pytest.raises(NodeFailure):
            await call()  # type: ignore[misc]
    woken = await Wakes(agent.host).wake(ID, 1.0)
    assert not woken.ok
    assert woken.elsewhere


async def test_a_fenced_machine_drains_stops_and_is_gone(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.agent() as agent:
        await agent.create(config=ALWAYS)
        await agent.wait("started")
        await agent.do(node.FenceMachine, generation=2)
        assert (await agent.host.find_record(ID)).desired.goal == "migrated"
        await gone(agent, world)
        assert (await agent.host.find_record(ID)).state is State.MIGRATED
        assert world.proxy.drains == [(ID, None)]
        await everything_that_starts(agent)
        starts = dict(world.driver.starts)
    async with world.agent() as agent:
        await everything_that_starts(agent)
        assert world.driver.starts == starts


async def test_a_lease_does_not_keep_a_fenced_machine(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.agent() as agent:
        await agent.create(lease_ttl_s=600, owner="somebody")
        await agent.wait("started")
        await agent.do(node.FenceMachine, generation=2)
        await gone(agent, world)


async def test_a_fence_comes_before_the_machine(tmp_path: Path) -> None:
    """A creation that was slower than the move away from this host."""
    world = World(tmp_path)
    async with world.agent() as agent:
        await agent.do(node.FenceMachine, generation=2)
    async with world.agent() as agent:
        with pytest.raises(NodeFailure, match="placed elsewhere"):
            await agent.create(generation=1)
        await agent.create(generation=2, request_id="newer")
        await agent.wait("started")


async def test_a_machine_may_come_back_with_a_newer_generation(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        with pytest.raises(NodeFailure, match="on its way out"):
            await agent.create(generation=3, request_id="early")
        await agent.do(node.FenceMachine, generation=2)
        await gone(agent, world)
        await agent.create(generation=3, request_id="back")
        await agent.wait("started")
        await agent.do(node.FenceMachine, generation=3)
        assert (await agent.get()).state == "started", "a fence below its generation does not concern it"


async def test_what_was_placed_elsewhere_while_no_agent_ran_is_not_started(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.agent() as agent:
        await agent.create(config=ALWAYS)
        await agent.wait("started")
    world.driver.crash(ID)
    starts = dict(world.driver.starts)
    world.elsewhere[ID] = 2
    async with world.agent() as agent:
        await gone(agent, world)
        assert world.driver.starts == starts


async def test_a_hidden_machine_runs_and_is_shown_when_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.agent() as agent:
        await agent.create(generation=2, hidden=True)
        await agent.wait("started")
        await agent.until(lambda machine: any(event.type == "ready" for event in machine.events))
        assert not world.rows.rows
    async with world.agent() as agent:
        assert not world.rows.rows, "nor does an agent that adopts it tell"
        with pytest.raises(NodeFailure, match="generation 1"):
            await agent.do(node.PublishMachine, generation=1)
        await agent.do(node.PublishMachine, generation=2)
        row = world.rows.rows["routes", f"m/{ID}"]
        assert (row["generation"], row["state"]) == (2, "started")
        assert any(key.startswith("svc/") for _, key in world.rows.rows)


# -- what the view tells ---------------------------------------------------------------------------------------------


def owned(key: str, value: dict[str, object] | None, *, stream: str = "routes", seq: int = 1) -> OwnedRow:
    return OwnedRow(stream=stream, key=key, seq=seq, value=value)


def machine_row(owner: str, generation: int) -> OwnedRow:
    names = ("id", "app", "region", "node", "instance_id", "generation", "state", "ip4", "ip6", "services", "passing")
    values = (ID, "hello", "iad", owner, "i", generation, "started", "", "", [], [])
    value: dict[str, object] = dict(zip(names, values, strict=True))
    return owned(f"m/{ID}", value)


def member_row(node_id: str, *, there: bool = True) -> OwnedRow:
    names = ("id", "region", "zone", "address", "verify_key", "sealing_key", "edge")
    value: dict[str, object] = dict(zip(names, (node_id, "iad", "a", "10.0.0.1", "", "", True), strict=True))
    return owned(f"member/{node_id}", value if there else None, stream="nodes")


@pytest.mark.parametrize("seed", range(6))
async def test_the_newest_generation_wins_in_whatever_order_rows_come(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    world, view = World(tmp_path), View(control="control")
    async with Journal.open(tmp_path / "marks.db") as marks, world.agent() as agent:
        fencing = Fencing(view, marks, node="node-1")
        await agent.create(config=ALWAYS, generation=3)
        await agent.wait("started")
        rows = [("node-1", machine_row("node-1", 3)), ("node-2", machine_row("node-2", 2))]
        rows += [("node-3", machine_row("node-3", 4)), ("node-2", machine_row("node-2", 1))]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fencing.run, agent.host)
            older: Sequence[tuple[str, OwnedRow]] = [row for row in rows if row[1].value and row[0] != "node-3"]
            for owner, row in dice.sample(older, len(older)):
                view.apply(owner, [row])
            await anyio.wait_all_tasks_blocked()
            assert (await agent.get()).state == "started"
            for owner, row in dice.sample(rows, len(rows)):
                view.apply(owner, [row])
            await gone(agent, world)
            view.apply("node-3", [], replace=True)  # the newer one is lost again: ours does not come back
            await everything_that_starts(agent)
            tasks.cancel_scope.cancel()


async def test_a_host_that_left_the_cluster_keeps_nothing_and_takes_nothing(tmp_path: Path) -> None:
    world, view = World(tmp_path), View(control="control")
    async with Journal.open(tmp_path / "marks.db") as marks, world.agent() as agent:
        fencing = Fencing(view, marks, node="node-1")
        await agent.create(config=ALWAYS)
        await agent.wait("started")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fencing.run, agent.host)
            view.apply("control", [member_row("node-2")])
            await anyio.wait_all_tasks_blocked()
            assert (await agent.get()).state == "started", "a view that is merely young says nothing"
            view.apply("control", [member_row("node-1")])
            view.apply("control", [member_row("node-1", there=False)])
            await gone(agent, world)
            with pytest.raises(NodeFailure, match="no more"):
                await agent.create("aaaaaaaaaaaaa1")
            tasks.cancel_scope.cancel()
    async with world.agent() as agent:
        with pytest.raises(NodeFailure, match="no more"):
            await agent.create("aaaaaaaaaaaaa1")


async def test_an_agent_that_died_between_hearing_and_writing_it_down_is_void_too(tmp_path: Path) -> None:
    world, view = World(tmp_path), View(control="control")
    async with world.agent() as agent:
        fencing = Fencing(view, agent.host.context.journal, node="node-1")
        await agent.create(config=ALWAYS)
        await agent.wait("started")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fencing.run, agent.host)
            view.apply("control", [member_row("node-1"), member_row("node-2")])
            await until(agent.host.context.journal.fences, lambda marks: "member/node-1" in marks, within_s=15)
            tasks.cancel_scope.cancel()
    later = View(control="control")
    later.apply("control", [member_row("node-2")])
    async with Journal.open(tmp_path / "journal.db") as journal:
        await Fencing(later, journal, node="node-1").open()
    async with world.agent() as agent:
        assert agent.host.is_void
        await gone(agent, world)


# -- killed anywhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", range(5))
async def test_killed_at_any_write_a_fenced_machine_never_starts_again(tmp_path: Path, group: int) -> None:
    for number in range(RUNS // 5):
        seed = group * 10_000 + number
        await one_history(tmp_path / str(seed), random.Random(seed), seed)


async def one_history(folder: Path, dice: random.Random, seed: int) -> None:
    """Lives of agents, each killed at some write; a start that was under way when the fence was acknowledged may end,
    none begins after it."""
    folder.mkdir()
    world, starts_max = World(folder), [-1]
    for _ in range(dice.randint(2, 4)):
        await one_life(world, dice, starts_max)
    async with world.agent() as agent:
        await agent.do(node.FenceMachine, generation=2)
        await until(lambda: nothing_left(agent, world), lambda left: not left, within_s=10, every_s=0.005)
        with pytest.raises(NodeFailure):
            await agent.create(request_id="late", config=ALWAYS)
    if starts_max[0] >= 0:
        assert world.driver.starts.get(ID, 0) <= starts_max[0], f"seed {seed}"


async def one_life(world: World, dice: random.Random, starts_max: list[int]) -> None:
    journals: list[KillingJournal] = []

    def wrap(journal: Any) -> KillingJournal:
        journals.append(KillingJournal(journal, at=dice.randint(1, 20), after_write=dice.random() < 0.5))
        return journals[-1]

    async with anyio.create_task_group() as tasks:

        async def die() -> None:
            while not journals:
                await anyio.sleep(0)
            await journals[0].dead.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(die)
        async with world.agent(wrap) as agent:
            for _ in range(dice.randint(3, 12)):
                if await one_step(agent, world, dice) and starts_max[0] < 0:
                    starts_max[0] = world.driver.starts.get(ID, 0) + 1
        tasks.cancel_scope.cancel()


async def one_step(agent: RunningAgent, world: World, dice: random.Random) -> bool:
    """One random thing; whether a fence was acknowledged."""
    what = dice.choice(["create", "create", "start", "stop", "restart", "crash", "wake", "fence", "pause", "pause"])
    try:
        if what == "create":
            await agent.create(config=ALWAYS, hidden=dice.random() < 0.3)
        elif what == "start":
            await agent.do(node.StartMachine)
        elif what == "stop":
            await agent.do(node.StopMachine, timeout_s=0.01)
        elif what == "restart":
            await agent.do(node.RestartMachine)
        elif what == "wake":
            await Wakes(agent.host).wake(ID, 0.01)
        elif what == "crash" and ID in world.driver.running():
            world.driver.crash(ID)
        elif what == "fence":
            await agent.do(node.FenceMachine, generation=2)
            return True
        else:
            for _ in range(dice.randrange(30)):
                await anyio.sleep(0)
    except NodeFailure as failure:
        if failure.error.kind == "InternalError":
            raise
    return False
