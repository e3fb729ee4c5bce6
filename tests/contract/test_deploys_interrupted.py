"""Deploys that are cancelled or killed in the middle: what was open is put back, the next deploy goes on."""

from __future__ import annotations

import anyio
import pytest
from deploying import Deploying, config, looks_at, tries_of

from pantala.planner.deploy import Plan, ReleaseCommand
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.api import CreateReleaseRequest, UpdateReleaseRequest
from pantala.wire.machine import Machine, MachineConfig, Restart

pytestmark = pytest.mark.anyio


class Running:
    """A deploy in a task of its own, to be cancelled from outside."""

    def __init__(self, deploying: Deploying, plan: Plan, machines: list[Machine], **settings: float | bool) -> None:
        self._deploying = deploying
        self._run = lambda: deploying.run(plan, machines, **({"wait_timeout_s": 60} | settings))
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    async def __call__(self) -> None:
        with self.scope:
            await self._run()
        self.ended.set()

    async def cancel(self) -> None:
        self.scope.cancel()
        with anyio.fail_after(20):
            await self.ended.wait()


def updates(deploying: Deploying, count: int) -> bool:
    return sum(action == "update" for action, _ in deploying.mutations()) >= count


async def updated(deploying: Deploying, count: int) -> None:
    async def look() -> bool:
        return updates(deploying, count)

    await until(look, bool, within_s=20)


async def test_a_cancelled_deploy_puts_its_open_step_back(deploying: Deploying) -> None:
    machines = await deploying.machines(2)
    deploying.agent.accepts = False
    deploy = Running(deploying, deploying.plan(machines, served=True), machines)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deploy)
        await updated(deploying, 1)
        assert (await deploying.release()).status == "running"
        await deploy.cancel()
    assert set(deploying.versions().values()) == {"v1"}
    assert {m.state.value for m in deploying.agent.machines.values()} == {"started"}
    assert all(machine.lease is None for machine in deploying.agent.machines.values())
    release = await deploying.release()
    assert (release.status, release.cursor) == ("interrupted", 0)
    assert "its open step was put back; the previous version still serves" in release.reason
    assert any("the previous version still serves; `pantala deploy` begins again" in line for line in deploying.said)


async def test_steps_that_were_finished_stay_and_the_next_deploy_goes_on(deploying: Deploying) -> None:
    machines = await deploying.machines(3)
    plan = deploying.plan(machines, http=True)
    first = min(m.id for m in machines)
    deploying.agent.answers = False
    deploy = Running(deploying, plan, machines, smoke_checks=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deploy)
        await updated(deploying, 1)
        deploying.agent.answer(deploying.agent.machines[first])
        await updated(deploying, 2)
        await deploy.cancel()
    assert {machine for machine, version in deploying.versions().items() if version == "v2"} == {first}
    release = await deploying.release()
    assert (release.status, release.cursor) == ("interrupted", 1)
    assert "the new version stays on 1 machine of finished steps" in release.reason
    deploying.agent.answers = True
    machines = await deploying.client.machines("web")
    await deploying.run(deploying.plan(machines, http=True), machines)
    assert set(deploying.versions().values()) == {"v2"}


async def test_machines_that_a_cancelled_deploy_made_are_removed(deploying: Deploying) -> None:
    """Also one whose creation was on its way when the cancellation came."""
    deploying.agent.accepts = False

    async def asked() -> bool:
        return bool(deploying.mutations())

    deploy = Running(deploying, deploying.plan([], served=True), [])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deploy)
        await until(asked, bool, within_s=20, every_s=0.001)
        await deploy.cancel()
    assert deploying.versions() == {}


async def test_a_cancelled_release_command_is_removed(deploying: Deploying) -> None:
    once = MachineConfig(image="registry.pantala.test/web:v2", auto_destroy=True, restart=Restart(policy="no"))
    command = ReleaseCommand(config=once, region="iad", timeout_s=60)
    machines = await deploying.machines(1)
    deploy = Running(deploying, deploying.plan(machines, command=command), machines)

    async def made() -> list[str]:
        return [machine for machine in deploying.versions() if machine != machines[0].id]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deploy)
        found = await until(made, bool, within_s=20)
        await until(looks_at(deploying, found[0]), bool, within_s=20)
        await deploy.cancel()
    assert deploying.versions() == {machines[0].id: "v1"}


async def test_without_rollback_a_cancelled_deploy_leaves_what_it_did(deploying: Deploying) -> None:
    machines = await deploying.machines(2)
    deploying.agent.accepts = False
    deploy = Running(deploying, deploying.plan(machines, served=True), machines, rollback=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deploy)
        await updated(deploying, 1)
        await deploy.cancel()
    assert sorted(deploying.versions().values()) == ["v1", "v2"]
    assert "1 machine(s) keep the new version" in (await deploying.release()).reason


async def test_a_deploy_that_is_cancelled_before_it_changed_anything_leaves_no_release(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    await deploying.client.acquire_lease("web", machines[0].id, ttl_s=3_600, description="by hand")
    deploying.agent.calls.clear()
    deploy = Running(deploying, deploying.plan(machines), machines, lease_wait_s=60)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deploy)
        await until(tries_of(deploying, machines[0].id), bool, within_s=20)
        await deploy.cancel()
    assert await deploying.client.releases("web") == []


async def test_what_a_killed_deploy_left_is_marked_and_finished_by_the_next(deploying: Deploying) -> None:
    machines = await deploying.machines(2)
    client = deploying.client
    killed = await client.create_release("web", CreateReleaseRequest(image="registry.pantala.test/web:v2"))
    await client.update_release("web", killed.id, UpdateReleaseRequest(status="running", plan="{}", cursor=1))
    deploying.agent.machines[machines[0].id].config = config(2)
    await deploying.run(deploying.plan(machines), await client.machines("web"))
    newest, before = await client.releases("web")
    assert (newest.version, newest.status) == (2, "complete")
    assert (before.status, before.reason) == ("interrupted", "its deploy ended without a word; v2 followed")
    assert any("v1 was left in the middle" in line for line in deploying.said)
    assert set(deploying.versions().values()) == {"v2"}
    assert not any(isinstance(call, node.DestroyMachine) for call in deploying.agent.calls)
