"""Deploys executed over the real API with a fake agent: order, health, leases, putting back, what the release says."""

from __future__ import annotations

import anyio
import pytest
from deploying import Deploying, config, looks_at, tries_of

from pantala.deploys.executor import DeployFailed
from pantala.deploys.health import SILENT_ENDED_MIN
from pantala.errors import CapacityError, LeaseHeld
from pantala.planner.deploy import ReleaseCommand, Wanted, plan_deploy
from pantala.testing.fake_agent import FakeMachine
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import MachineConfig, Restart

pytestmark = pytest.mark.anyio


async def test_the_first_deploy_makes_two_machines_of_an_app_with_services(deploying: Deploying) -> None:
    plan = deploying.plan([], served=True)
    release = await deploying.run(plan, [])
    assert list(deploying.versions().values()) == ["v2", "v2"]
    assert (release.status, release.cursor) == ("complete", len(plan.waves))
    assert release.plan
    assert "create" in release.plan


async def test_rolling_updates_one_machine_first_and_leaves_sleepers_asleep(deploying: Deploying) -> None:
    machines = await deploying.machines(4, asleep=1)
    plan = deploying.plan(machines)
    release = await deploying.run(plan, machines)
    assert set(deploying.versions().values()) == {"v2"}
    order = [machine for action, machine in deploying.mutations() if action == "update"]
    asleep = next(m.id for m in machines if m.state == "stopped")
    assert order[0] == min(m.id for m in machines if m.state == "started")
    assert order[-1] == asleep
    assert deploying.agent.machines[asleep].state.value == "stopped"
    assert all(machine.lease is None for machine in deploying.agent.machines.values())
    assert (release.status, release.cursor) == ("complete", len(plan.waves))


async def test_a_sleeping_app_is_tried_with_one_machine_that_sleeps_again(deploying: Deploying) -> None:
    machines = await deploying.machines(2, asleep=2)
    await deploying.run(deploying.plan(machines), machines)
    assert set(deploying.versions().values()) == {"v2"}
    first = min(m.id for m in machines)
    actions = [action for action, machine in deploying.mutations() if machine == first]
    assert actions == ["update", "start", "stop"]
    assert {m.state.value for m in deploying.agent.machines.values()} == {"stopped"}


async def test_a_version_that_exits_is_put_back(deploying: Deploying) -> None:
    machines = await deploying.machines(3)
    deploying.agent.exit_at_start, deploying.agent.last_words = 7, "ImportError: no module named flask"
    error = await deploying.failing(deploying.plan(machines), machines)
    assert isinstance(error, DeployFailed)
    assert "exited at start with code 7" in error.message
    assert "the previous version still serves" in error.message
    assert "ImportError: no module named flask" in (error.hint or "")
    assert set(deploying.versions().values()) == {"v1"}
    touched = {machine for _, machine in deploying.mutations()}
    assert touched == {min(m.id for m in machines)}, "more than the first machine was touched"
    release = await deploying.release()
    assert (release.status, release.cursor) == ("failed", 0)
    assert "code 7" in release.reason
    assert all(machine.lease is None for machine in deploying.agent.machines.values())


async def test_without_rollback_the_machine_keeps_the_new_version(deploying: Deploying) -> None:
    machines = await deploying.machines(2)
    deploying.agent.exit_at_start = 1
    error = await deploying.failing(deploying.plan(machines), machines, rollback=False)
    assert "1 machine(s) keep the new version" in error.message
    assert sorted(deploying.versions().values()) == ["v1", "v2"]


async def test_machines_made_by_a_failed_deploy_are_removed(deploying: Deploying) -> None:
    deploying.agent.exit_at_start = 1
    error = await deploying.failing(deploying.plan([], served=True), [])
    assert "nothing was left behind" in error.message
    assert deploying.versions() == {}


async def test_no_room_for_a_new_group_leaves_the_old_one(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    deploying.agent.fail_next[node.CreateMachine] = CapacityError("node-1 is full")
    plan = plan_deploy(
        machines=machines,
        wanted=[
            Wanted(group="app", config=config(2)),
            Wanted(group="worker", config=config(2, group="worker")),
        ],
        primary_region="iad",
        strategy="rolling",
        max_unavailable=0.34,
        high_availability=True,
    )
    error = await deploying.failing(plan, machines)
    assert "the previous version still serves" in error.message
    assert deploying.versions() == {machines[0].id: "v1"}


async def test_an_update_that_is_refused_leaves_every_machine_as_it_was(deploying: Deploying) -> None:
    machines = await deploying.machines(2)
    deploying.platform.registry.missing.add("registry.pantala.test/web:v2")
    await deploying.client.set_secrets("web", {"STAGED": "kept"})
    secrets = await deploying.client.secrets("web")
    for _ in range(2):
        error = await deploying.failing(deploying.plan(machines), machines)
        assert "registry.pantala.test/web:v2" in error.message
    assert deploying.mutations() == []
    assert await deploying.client.releases("web") == [], "a refused deploy left a release"
    assert await deploying.client.secrets("web") == secrets
    deploying.platform.registry.missing.clear()
    assert (await deploying.run(deploying.plan(machines), machines)).version == 1


async def test_a_machine_that_never_accepts_is_named_when_the_time_is_up(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    deploying.agent.accepts = False
    error = await deploying.failing(deploying.plan(machines, served=True), machines, wait_timeout_s=0.5)
    assert f"machine {machines[0].id} is still started after 0.5 s" in error.message
    assert set(deploying.versions().values()) == {"v1"}


async def test_a_version_that_answered_is_well_at_once(deploying: Deploying) -> None:
    """Without the answer it would be watched for seconds, as one is that speaks no HTTP."""
    machines = await deploying.machines(2)
    deploying.agent.answers = False

    async def ready() -> list[FakeMachine]:
        return [m for m in deploying.agent.machines.values() if m.events[0].type == "ready"]

    async with anyio.create_task_group() as tasks:

        async def deploy() -> None:
            await deploying.run(deploying.plan(machines, http=True), machines, smoke_checks=True)

        tasks.start_soon(deploy)
        first = await until(ready, lambda found: len(found) == 1, within_s=20)
        await until(looks_at(deploying, first[0].id), lambda looks: looks >= 2, within_s=20)
        assert len(await ready()) == 1, "the next was touched before the first had answered"
        deploying.agent.answer(first[0])
        deploying.agent.answers = True
    assert set(deploying.versions().values()) == {"v2"}


async def test_a_server_whose_workers_die_is_put_back_with_their_last_words(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    deploying.agent.answers, deploying.agent.workers_end = False, True
    deploying.agent.say(machines[0].id, "SystemExit: no database")
    known = {"smoke_checks": True, "silent_s": 0.3}
    error = await deploying.failing(deploying.plan(machines, http=True), machines, **known)
    said = "the app accepts connections on port 8080 but does not answer HTTP: its processes end soon after they start"
    assert f"machine {machines[0].id}: {said}; the previous version still serves" in error.message
    assert "SystemExit: no database" in (error.hint or "")
    assert set(deploying.versions().values()) == {"v1"}


async def test_an_app_that_is_slow_to_answer_has_the_whole_wait_timeout(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    deploying.agent.answers = False
    known = {"smoke_checks": True, "silent_s": 0.0, "wait_timeout_s": 1}
    error = await deploying.failing(deploying.plan(machines, http=True), machines, **known)
    assert "the app accepts connections on port 8080 but does not answer HTTP, after 1 s" in error.message
    looks = sum(isinstance(call, node.ListProcesses) for call in deploying.agent.calls)
    assert looks > SILENT_ENDED_MIN
    deploying.agent.calls.clear()
    await deploying.run(deploying.plan(machines, http=True), machines, smoke_checks=False)
    assert set(deploying.versions().values()) == {"v2"}, "without smoke checks no answer is waited for"


async def test_a_lease_of_someone_else_is_waited_for_then_named(deploying: Deploying) -> None:
    machines = await deploying.machines(2)
    lease = await deploying.client.acquire_lease("web", machines[0].id, ttl_s=3_600, description="by hand")
    error = await deploying.failing(deploying.plan(machines), machines)
    assert isinstance(error, LeaseHeld)
    assert set(deploying.versions().values()) == {"v1"}
    assert await deploying.client.releases("web") == [], "a deploy that changed nothing left a release"
    assert deploying.agent.machines[machines[1].id].lease is None, "a lease was left behind"
    async with anyio.create_task_group() as tasks:

        async def deploy() -> None:
            await deploying.run(deploying.plan(machines), machines, lease_wait_s=60)

        tasks.start_soon(deploy)
        await until(tries_of(deploying, machines[0].id), lambda tries: tries >= 2, within_s=20)
        await deploying.client.release_lease("web", machines[0].id, nonce=lease.nonce)
    assert set(deploying.versions().values()) == {"v2"}


async def test_immediate_touches_all_at_once_unchecked(deploying: Deploying) -> None:
    machines = await deploying.machines(3)
    deploying.agent.accepts = False
    plan = deploying.plan(machines, strategy="immediate", served=True)
    assert len(plan.waves) == 1
    assert (await deploying.run(plan, machines)).status == "complete"
    assert set(deploying.versions().values()) == {"v2"}


# -- release command ---------------------------------------------------------------------------------------------------


def command(timeout_s: float = 10) -> ReleaseCommand:
    once = MachineConfig(image="registry.pantala.test/web:v2", auto_destroy=True, restart=Restart(policy="no"))
    return ReleaseCommand(config=once, region="iad", timeout_s=timeout_s)


async def test_a_release_command_runs_before_any_machine_changes(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    deploying.agent.exit_at_start = 0

    async def ended() -> bool:
        return any(machine.state.value == "destroyed" for machine in deploying.agent.machines.values())

    async with anyio.create_task_group() as tasks:

        async def deploy() -> None:
            await deploying.run(deploying.plan(machines, command=command()), machines)

        tasks.start_soon(deploy)
        await until(ended, bool, within_s=20, every_s=0.005)
        deploying.agent.exit_at_start = None
    assert [action for action, _ in deploying.mutations()][:2] == ["create", "update"]
    assert deploying.versions() == {machines[0].id: "v2"}


async def test_a_release_command_that_fails_stops_the_deploy(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    deploying.agent.exit_at_start, deploying.agent.last_words = 2, "migration 7 failed"
    error = await deploying.failing(deploying.plan(machines, command=command()), machines)
    assert "the release command exited with code 2" in error.message
    assert "migration 7 failed" in (error.hint or "")
    assert deploying.versions() == {machines[0].id: "v1"}
    assert [action for action, _ in deploying.mutations()] == ["create"]


async def test_a_release_command_without_end_is_ended(deploying: Deploying) -> None:
    machines = await deploying.machines(1)
    error = await deploying.failing(deploying.plan(machines, command=command(0.3)), machines)
    assert "the release command took more than 0.3 s" in error.message
    assert deploying.versions() == {machines[0].id: "v1"}
