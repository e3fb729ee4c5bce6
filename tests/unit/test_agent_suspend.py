"""Suspend and resume through the node API, on fakes: memory kept, one write, and what makes it boot instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from pantala.agent.wakes import Wakes
from pantala.domain import suspend
from pantala.kit.sealing import seal
from pantala.testing.agent import APP, FAST, IMAGE, NodeFailure, RunningAgent, World, config, service
from pantala.testing.driver import Behaviour
from pantala.testing.killing import KillingJournal
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import Guest, Init, Machine, MachineConfig, Restart

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def story(machine: Machine, *kinds: str) -> list[tuple[str, str, str]]:
    return [
        (event.type, event.status, (event.request.reason if event.request else "") or "")
        for event in reversed(machine.events)
        if event.type in kinds
    ]


async def suspended(agent: RunningAgent, **create: Any) -> Machine:
    made = await agent.create(**create)
    await agent.wait("started")
    await agent.do(node.SuspendMachine)
    await agent.wait("suspended")
    return made


async def test_a_suspended_machine_goes_on_where_it_was(world: World) -> None:
    async with world.agent() as agent:
        made = await suspended(agent)
        assert world.driver.suspended() == {ID}
        assert world.proxy.drains == [(ID, None)]
        row = world.rows.rows["routes", f"m/{ID}"]
        assert (row["state"], row["passing"]) == ("suspended", [False])
        assert (await agent.do(node.StartMachine)).previous_state == "suspended"
        await agent.wait("started")
        machine = await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["passing"] == [True])
        assert (world.driver.starts[ID], world.driver.resumes[ID]) == (1, 1)
        assert machine.instance_id == made.instance_id
        assert story(machine, "suspend") == [("suspend", "suspending", ""), ("suspend", "suspended", "")]
        assert story(machine, "start")[-2:] == [("start", "starting", "resume"), ("start", "started", "resume")]


async def test_a_request_that_wakes_it_waits_for_one_write(world: World) -> None:
    """The second one never ends, and the request is answered all the same."""

    def dies_late(journal: Any) -> KillingJournal:
        killing.append(KillingJournal(journal, at=10_000, after_write=False))
        return killing[0]

    killing: list[KillingJournal] = []
    async with world.agent(dies_late) as agent:
        await suspended(agent)
        killing[0].stop_at(killing[0].count + 2)
        result = await Wakes(agent.host).wake(ID, 5)
        assert (result.ok, bool(result.ip4)) == (True, True), result
        assert world.driver.resumes[ID] == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"guest": Guest(cpus=2, memory_mb=4096)}, "4096 MB of memory; machines with at most 2048 MB"),
        ({"init": Init(swap_size_mb=512)}, "it has swap"),
        ({"schedule": "hourly", "services": []}, "it has a schedule"),
    ],
)
async def test_what_cannot_be_suspended_is_refused_with_its_reason(
    world: World, changes: dict[str, Any], why: str
) -> None:
    assert why in suspend.why_not(config(**changes))
    async with world.agent() as agent:
        await agent.create(config=config(**changes))
        await agent.wait("started")
        with pytest.raises(NodeFailure, match=why) as caught:
            await agent.do(node.SuspendMachine)
        assert caught.value.error.http_code == 412
        assert (await agent.get()).state == "started"


def test_two_gigabytes_may_sleep() -> None:
    assert suspend.why_not(MachineConfig(guest=Guest(memory_mb=2048))) == ""


async def test_a_stop_drops_what_a_suspended_machine_held(world: World) -> None:
    async with world.agent() as agent:
        await suspended(agent)
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        assert world.driver.suspended() == set()
        assert story(await agent.get(), "stop")[-1][2] == "what it held in memory was dropped"
        await agent.do(node.StartMachine)
        await agent.wait("started")
        assert world.driver.starts[ID] == 2


async def test_an_update_of_a_suspended_machine_leaves_it_stopped_with_the_new_version(world: World) -> None:
    async with world.agent() as agent:
        await suspended(agent)
        updated = await agent.do(node.UpdateMachine, config=config(env={"V": "2"}), image=IMAGE)
        await agent.wait("stopped", version=updated.instance_id)
        assert world.driver.starts[ID] == 1


async def test_a_suspended_machine_is_destroyed_without_force(world: World) -> None:
    async with world.agent() as agent:
        await suspended(agent)
        await agent.do(node.DestroyMachine)
        await agent.wait("destroyed")
        assert world.driver.machines == {}
        assert world.network.plans == {}


async def test_a_start_that_comes_while_it_falls_asleep_is_done_after_it(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        await agent.do(node.SuspendMachine)
        await agent.do(node.StartMachine)
        await agent.until(lambda m: m.state == "started" and not agent.host.get(ID).record.queued())
        assert world.driver.starts[ID] == 1
        assert world.driver.running() == {ID}


async def test_what_cannot_be_frozen_is_stopped(world: World) -> None:
    world.driver.behaviour = Behaviour(suspend_fails="the freezer is broken")
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        await agent.do(node.SuspendMachine)
        machine = await agent.until(lambda m: m.state == "stopped")
        assert "the freezer is broken; stopped instead" in story(machine, "suspend")[-1][2]


async def test_what_cannot_be_resumed_boots(world: World) -> None:
    async with world.agent() as agent:
        await suspended(agent)
        world.driver.behaviour = Behaviour(resume_fails="it does not thaw")
        await agent.do(node.StartMachine)
        machine = await agent.until(lambda m: m.state == "started")
        assert world.driver.starts[ID] == 2
        assert any("it does not thaw; it boots instead" in why for _, _, why in story(machine, "start"))


async def test_restart_policies_do_not_see_a_suspended_machine_that_is_killed(world: World) -> None:
    async with world.agent() as agent:
        await suspended(agent, config=config(restart=Restart(policy="always")))
        world.driver.crash(ID, exit_code=137, signal=9)
        machine = await agent.until(lambda m: m.state == "stopped")
        assert story(machine, "suspend")[-1][:2] == ("suspend", "lost")
        assert world.driver.starts[ID] == 1


async def test_a_suspended_machine_keeps_its_room(world: World) -> None:
    async with world.agent() as agent:
        await suspended(agent, config=config(guest=Guest(memory_mb=2048)))
        assert agent.host.used()[1] == 2048


@pytest.mark.parametrize("lost", [False, True])
async def test_a_new_agent_finds_it_suspended_unless_the_host_lost_it(world: World, lost: bool) -> None:
    async with world.agent() as agent:
        await suspended(agent)
    if lost:
        world.driver.machines.clear()
    async with world.agent() as agent:
        machine = await agent.get()
        assert machine.state == ("stopped" if lost else "suspended")
        await agent.do(node.StartMachine)
        await agent.wait("started")
        assert world.driver.starts[ID] == (2 if lost else 1)


async def test_versions_are_kept_with_what_replaced_them(world: World) -> None:
    async with world.agent() as agent:
        first = await agent.create()
        await agent.wait("started")
        second = await agent.do(node.UpdateMachine, config=config(env={"V": "2"}), image=IMAGE)
        replaced = await agent.call(
            node.WaitMachine(machine_id=ID, states=["replaced"], timeout_s=5, version=first.instance_id)
        )
        assert (replaced.state, replaced.version) == ("replaced", first.instance_id)
        await agent.wait("started", version=second.instance_id)
        versions = await agent.call(node.ListVersions(machine_id=ID))
        shown = [(v.version, v.status, (v.user_config.env or {}).get("V")) for v in versions]
        assert shown == [(second.instance_id, "current", "2"), (first.instance_id, "replaced", None)]
        await agent.do(node.DestroyMachine, force=True)
        await agent.wait("destroyed")
        assert await agent.call(node.ListVersions(machine_id=ID)) == versions


async def test_a_machine_that_never_came_up_is_cleaned_up(tmp_path: Path) -> None:
    world = World(tmp_path, pace=msgspec.structs.replace(FAST, launch_failed_kept_s=0.05))
    world.images.missing.add("hello")
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("destroyed")
        machine = await agent.get()
        assert ("start", "launch_failed") in [(e.type, e.status) for e in machine.events]
        assert any("its launch failed" in why for _, _, why in story(machine, "destroy"))


async def test_a_machine_that_never_came_up_takes_another_version(world: World) -> None:
    world.images.missing.add("hello")
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("launch_failed")
        await agent.do(node.StopMachine)
        world.images.missing.clear()
        await agent.do(node.UpdateMachine, config=config(services=[service()]), image=IMAGE)
        await agent.wait("started")


async def test_secrets_that_are_too_old_are_waited_for(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(min_secrets_version=2)

        async def reason() -> str:
            return agent.host.get(ID).record.reason

        await until(
            reason, lambda why: "secrets version 2 has not reached this host" in why, within_s=15, every_s=0.001
        )
        text = seal(world.node_key.public_key, b"{}")
        await agent.call(
            node.PutSecrets(request_id="s", secrets=node.SealedSecrets(app=APP.name, version=2, sealed=text))
        )
        await agent.wait("started")
