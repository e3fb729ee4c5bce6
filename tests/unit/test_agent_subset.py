"""What loops of the agent look at every second: only machines of which something may be due, however many sleep."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.agent.subset import Subset
from pantala.domain.machine import State
from pantala.journal import MachineRecord
from pantala.testing.agent import World
from pantala.wire import node

pytestmark = pytest.mark.anyio

ASLEEP = [f"d8d9510a29510{number}" for number in range(5)]


class Looked:
    """Counts the records that it is shown."""

    def __init__(self) -> None:
        self.times = 0

    def started(self, record: MachineRecord) -> bool:
        self.times += 1
        return record.state is State.STARTED


async def test_records_are_looked_at_again_only_after_one_has_changed(tmp_path: Path) -> None:
    looked = Looked()
    async with World(tmp_path).agent() as agent:
        for machine_id in ASLEEP:
            await agent.create(machine_id, skip_launch=True)
        started = Subset(agent.host, looked.started)
        assert started.tasks() == []
        for _ in range(10):
            started.tasks()
        assert looked.times == len(ASLEEP)


async def test_one_that_starts_is_found_and_one_that_ends_is_not(tmp_path: Path) -> None:
    async with World(tmp_path).agent() as agent:
        started = Subset(agent.host, Looked().started)
        awake = Subset(agent.host, lambda record: True)
        await agent.create(ASLEEP[0])
        assert started.tasks() == []
        await agent.wait("started", machine_id=ASLEEP[0])
        assert [task.record.id for task in started.tasks()] == [ASLEEP[0]]
        await agent.do(node.StopMachine, ASLEEP[0])
        await agent.wait("stopped", machine_id=ASLEEP[0])
        assert started.tasks() == []
        assert [task.record.id for task in awake.tasks()] == [ASLEEP[0]]
        await agent.do(node.DestroyMachine, ASLEEP[0], force=True)
        await agent.until(lambda machine: machine.state == "destroyed", ASLEEP[0])
        assert [task.record.state for task in awake.tasks()] in ([], [State.DESTROYED])


async def test_room_that_is_taken_and_given_back_is_counted(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.agent() as agent:
        assert agent.host.used() == (0, 0)
        await agent.create(ASLEEP[0])
        cpus, memory_mib = agent.host.used()
        assert (cpus > 0, memory_mib) == (True, 256)
        assert agent.host.used(without=ASLEEP[0]) == (0, 0)
        await agent.wait("started", machine_id=ASLEEP[0])
        await agent.do(node.StopMachine, ASLEEP[0])
        await agent.wait("stopped", machine_id=ASLEEP[0])
        assert agent.host.used() == (0, 0)
    async with world.agent() as agent:  # another agent finds what is there
        assert agent.host.used() == (0, 0)
        await agent.do(node.StartMachine, ASLEEP[0])
        assert agent.host.used()[1] == 256
