"""The agent is killed at a journal commit, again and again; what is left must be whole.

Seeded: a run that fails prints its seed. `PANTALA_KILL_RUNS` sets how many (500 by default).
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from pantala.agent.host import Host
from pantala.domain.machine import PERSISTENT, TERMINAL, TRANSITIONS, State
from pantala.testing.agent import IMAGE, NodeFailure, RunningAgent, World, config
from pantala.testing.driver import Behaviour
from pantala.testing.killing import KillingJournal
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import Guest, Restart

pytestmark = pytest.mark.anyio

RUNS = int(os.environ.get("PANTALA_KILL_RUNS", "500"))
GROUPS = 10
IDS = ("aaaaaaaaaaaaa1", "aaaaaaaaaaaaa2")


class Acknowledged:
    """What callers were told had been taken, and so must be true in the end."""

    def __init__(self) -> None:
        self.created: set[str] = set()
        self.destroyed: set[str] = set()
        self.version: dict[str, str] = {}
        self.goal: dict[str, str] = {}


def kept_root(machine_id: str, dice: random.Random) -> Guest:
    """The root of the first machine is never lost."""
    return Guest(persist_rootfs="always" if machine_id == IDS[0] else dice.choice(["never", "restart", "always"]))


async def act(agent: RunningAgent, world: World, dice: random.Random, told: Acknowledged) -> None:
    """One random thing that a caller, an app or time does."""
    machine_id = dice.choice(IDS)
    what = dice.choice(
        [
            "create",
            "create",
            "start",
            "stop",
            "suspend",
            "suspend",
            "update",
            "restart",
            "destroy",
            "crash",
            "settle",
            "cordon",
        ]
    )
    with refusals_are_fine():
        match what:
            case "create":
                policy = dice.choice(["no", "on-failure", "always"])
                made = await agent.create(
                    machine_id,
                    config=config(restart=Restart(policy=policy), guest=kept_root(machine_id, dice)),
                    skip_launch=dice.random() < 0.2,
                )
                if machine_id not in told.created:
                    told.created.add(machine_id)
                    told.version[machine_id] = made.instance_id
            case "start":
                told.goal.pop(machine_id, None)
                await agent.do(node.StartMachine, machine_id)
                told.goal[machine_id] = "started"
            case "stop":
                told.goal.pop(machine_id, None)
                await agent.do(node.StopMachine, machine_id, timeout_s=0.01)
                told.goal[machine_id] = "stopped"
            case "suspend":
                told.goal.pop(machine_id, None)
                await agent.do(node.SuspendMachine, machine_id)
                told.goal[machine_id] = "suspended"
            case "update":
                told.goal.pop(machine_id, None)
                told.version.pop(machine_id, None)
                changed = config(env={"V": str(dice.random())}, guest=kept_root(machine_id, dice))
                made = await agent.do(node.UpdateMachine, machine_id, config=changed, image=IMAGE)
                told.version[machine_id] = made.instance_id
            case "restart":
                told.goal.pop(machine_id, None)
                await agent.do(node.RestartMachine, machine_id)
            case "destroy":
                told.goal.pop(machine_id, None)
                told.version.pop(machine_id, None)
                await agent.do(node.DestroyMachine, machine_id, force=dice.random() < 0.5)
                told.destroyed.add(machine_id)
            case "cordon":
                await agent.do(node.CordonMachine, machine_id, cordoned=dice.random() < 0.5)
            case "crash":
                if machine_id in world.driver.running() | world.driver.suspended():
                    told.goal.pop(machine_id, None)
                    world.driver.crash(machine_id, exit_code=dice.choice([0, 1, 137]))
            case _:
                for _ in range(dice.randrange(30)):
                    await anyio.sleep(0)


@contextmanager
def refusals_are_fine() -> Generator[None]:
    """The judge may refuse a random request; the host must not fail at one."""
    try:
        yield
    except NodeFailure as failure:
        if failure.error.kind == "InternalError":
            raise


def settled(host: Host) -> bool:
    return all(
        task.record.state in PERSISTENT | {State.LAUNCH_FAILED}
        and not task.record.queued()
        and task.record.desired.goal != "created"
        for task in host.machines.values()
    )


async def check(agent: RunningAgent, world: World, told: Acknowledged) -> None:
    host = agent.host

    async def look() -> str:
        if not settled(host):
            return f"unsettled: {[(t.record.state, t.record.desired, t.record.reason) for t in host.machines.values()]}"
        return await disagreement(host, world)

    await until(look, lambda problem: not problem, within_s=20, every_s=0.005)
    for machine_id in told.created:
        record = await host.find_record(machine_id)
        if machine_id == IDS[0] and machine_id not in told.destroyed:
            assert world.driver.roots_made.get(machine_id, 0) <= 1
        if machine_id in told.destroyed:
            assert record.state is State.DESTROYED
            continue
        if machine_id in told.version:
            assert record.version.instance_id == told.version[machine_id]
        if told.goal.get(machine_id) == "stopped":
            assert record.state in (State.STOPPED, State.FAILED, State.LAUNCH_FAILED)
        if told.goal.get(machine_id) == "suspended":
            assert record.state in (State.SUSPENDED, State.STOPPED, State.FAILED, State.LAUNCH_FAILED)


async def disagreement(host: Host, world: World) -> str:
    """What is wrong between journal, driver, network and rows; empty when nothing is."""
    live = set(host.machines)
    if extra := set(world.driver.machines) - live:
        return f"the driver holds {extra}"
    if extra := set(world.driver.kept) - live:
        return f"the driver keeps roots of {extra}"
    if extra := set(world.network.plans) - live:
        return f"the network holds {extra}"
    if steps := await host.context.journal.open_steps():
        return f"open steps {steps}"
    running = world.driver.running()
    for machine_id, task in host.machines.items():
        record, found = task.record, world.driver.machines.get(machine_id)
        if (record.state is State.STARTED) != (machine_id in running):
            return f"{machine_id} is {record.state}, the driver says {found.phase if found else 'nothing'}"
        if (record.state is State.SUSPENDED) != (machine_id in world.driver.suspended()):
            return f"{machine_id} is {record.state}, the driver says {found.phase if found else 'nothing'}"
        if found is not None and found.spec.instance_id != record.version.instance_id:
            return f"{machine_id} has a runtime of {found.spec.instance_id}"
        row = world.rows.rows.get(("routes", f"m/{machine_id}"))
        if row is None or row["state"] != str(record.state):
            return f"the row of {machine_id} is {row}, the record says {record.state}"
    if {key.removeprefix("m/") for _, key in world.rows.rows if key.startswith("m/")} != live:
        return "rows of machines that are gone"
    return ""


async def one_life(world: World, dice: random.Random, told: Acknowledged) -> None:
    """An agent that is killed at some commit, or at the end of its script."""
    journals: list[KillingJournal] = []

    def wrap(journal: Any) -> KillingJournal:
        journals.append(KillingJournal(journal, at=dice.randint(1, 24), after_write=dice.random() < 0.5))
        return journals[-1]

    async with anyio.create_task_group() as tasks:

        async def die() -> None:
            while not journals:
                await anyio.sleep(0)
            await journals[0].dead.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(die)
        async with world.agent(wrap) as agent:
            for _ in range(dice.randint(3, 14)):
                await act(agent, world, dice, told)
            for _ in range(50):
                await anyio.sleep(0)
        tasks.cancel_scope.cancel()


async def one_run(folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    world, told = World(folder), Acknowledged()
    world.driver.behaviour = Behaviour(
        exits_with=dice.choice([None, None, None, None, 0, 3]),
        start_fails=dice.choice([""] * 9 + ["no such file"]),
        guest_fault=dice.random() < 0.5,
        suspend_fails=dice.choice([""] * 9 + ["not frozen"]),
        resume_fails=dice.choice([""] * 9 + ["not thawed"]),
    )
    for _ in range(dice.randint(1, 2)):
        await one_life(world, dice, told)
    world.driver.behaviour = Behaviour()
    async with world.agent() as agent:
        await check(agent, world, told)


@pytest.mark.parametrize("group", range(GROUPS))
async def test_killed_at_a_commit_nothing_is_stuck_leaked_or_forgotten(tmp_path: Path, group: int) -> None:
    for number in range(RUNS // GROUPS):
        seed = group * 1_000_003 + number
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            await one_run(folder, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        shutil.rmtree(folder)


def test_every_transient_state_leads_somewhere() -> None:
    for state, following in TRANSITIONS.items():
        assert state in TERMINAL or following
