"""An agent on fakes, through the node API: what a caller sees of a machine's life."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest

from pantala.journal import Journal
from pantala.kit.clock import unix_ms
from pantala.kit.sealing import seal
from pantala.testing.agent import APP, FAST, IMAGE, NodeFailure, World, config, service
from pantala.testing.driver import Behaviour
from pantala.testing.killing import KillingJournal
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import Check, Guest, Machine, Restart

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def story(machine: Machine) -> list[tuple[str, str]]:
    return [(event.type, event.status) for event in reversed(machine.events)]


async def test_create_launches_and_the_machine_becomes_routable(world: World) -> None:
    async with world.agent() as agent:
        created = await agent.create()
        assert (created.state, story(created)) == ("created", [("launch", "created")])
        await agent.wait("started")
        machine = await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["passing"] == [True])
        assert machine.private_ip.startswith("fdaa:0:18:")
        assert story(machine) == [("launch", "created"), ("start", "starting"), ("start", "started")]
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
        assert (await agent.get()).state == "destroyed"

        async def rows() -> int:
            return len(world.rows.rows)

        await until(rows, lambda count: count == 0, within_s=15)


async def test_the_row_leaves_started_before_the_app_is_told_to_stop(world: World) -> None:
    """The proxy must never be pointed at a machine that is going away, nor at one that is not ready yet."""
    async with world.agent() as agent:
        world.prober.is_shut = True
        await agent.create()
        await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["state"] == "started")
        world.prober.is_shut = False
        await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["passing"] == [True])
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        states = [row.value["state"] for row in world.rows.steps if row.key == f"m/{ID}" and row.value]
        passing = [row.value["passing"] for row in world.rows.steps if row.key == f"m/{ID}" and row.value]
        assert world.proxy.drains == [(ID, None)]
        assert passing[states.index("started")] == [False]
        assert not any(flags == [True] for state, flags in zip(states, passing, strict=True) if state != "started")


async def test_skip_launch_settles_as_stopped_and_can_be_started(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(skip_launch=True)
        await agent.wait("stopped")
        assert world.driver.running() == set()
        await agent.do(node.StartMachine)
        await agent.wait("started")


async def test_a_crash_is_restarted_within_a_second_with_its_exit_event(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        world.driver.crash(ID, exit_code=137, signal=9, oom=True)
        machine = await agent.until(lambda m: m.state == "started" and any(e.type == "exit" for e in m.events))
        exited = next(e for e in machine.events if e.type == "exit")
        assert exited.request is not None
        shown = exited.request.exit_event
        assert shown is not None
        assert (shown.exit_code, shown.oom_killed, shown.restarting, shown.requested_stop) == (137, True, True, False)
        assert exited.request.restart_count == 1


async def test_a_crash_loop_ends_stopped_with_its_reason(world: World) -> None:
    world.driver.behaviour = Behaviour(exits_with=3)
    async with world.agent() as agent:
        await agent.create()
        machine = await agent.until(lambda m: m.state == "stopped")
        assert world.driver.starts[ID] == 11
        newest = next(e for e in machine.events if e.type == "exit")
        assert newest.request is not None
        assert "after 10 restarts" in (newest.request.reason or "")
        with pytest.raises(NodeFailure, match="after 10 restarts") as caught:
            await agent.wait("started", timeout_s=0.05)
        assert caught.value.error.http_code == 408


async def test_policy_no_and_auto_destroy(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=config(restart=Restart(policy="no"), auto_destroy=True, services=[]))
        await agent.wait("started")
        world.driver.crash(ID, exit_code=4)
        await agent.wait("destroyed")
        exited = next(e for e in (await agent.get()).events if e.type == "exit")
        assert exited.request is not None
        assert exited.request.exit_event is not None
        assert exited.request.exit_event.exit_code == 4
        assert world.driver.machines == {}


async def test_update_keeps_a_running_machine_running_and_a_stopped_one_stopped(world: World) -> None:
    async with world.agent() as agent:
        first = await agent.create()
        await agent.wait("started")
        updated = await agent.do(node.UpdateMachine, config=config(env={"V": "2"}), image=IMAGE)
        assert updated.instance_id != first.instance_id
        assert ("launch", "created") in story(updated)
        await agent.wait("started", version=updated.instance_id)
        outdated = f"started at version {first.instance_id}, it is started at version {updated.instance_id}"
        with pytest.raises(NodeFailure, match=f"machine failed to reach desired state {outdated}"):
            await agent.wait("started", version=first.instance_id, timeout_s=0.05)
        newest = (await agent.get()).events[0].id
        with pytest.raises(NodeFailure, match=f"desired state started after event {newest}, it is started since"):
            await agent.wait("started", from_event_id=newest, timeout_s=0.05)
        start = world.driver.machines[ID].start
        assert start is not None
        assert start.env["V"] == "2"
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        third = await agent.do(node.UpdateMachine, config=config(env={"V": "3"}), image=IMAGE)
        await agent.wait("stopped", version=third.instance_id)
        assert world.driver.starts[ID] == 2


async def test_an_update_whose_image_is_missing_leaves_the_old_version_serving(world: World) -> None:
    async with world.agent() as agent:
        first = await agent.create()
        await agent.wait("started")
        world.images.missing.add("gone")
        gone = msgspec.structs.replace(IMAGE, repository="gone", digest="sha256:" + "2" * 64)
        await agent.do(node.UpdateMachine, config=config(), image=gone)
        machine = await agent.until(lambda m: ("update", "failed") in story(m))
        assert machine.state == "started"
        assert machine.instance_id == first.instance_id
        assert world.driver.running() == {ID}


async def test_an_update_guards_against_a_lost_update(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        with pytest.raises(NodeFailure, match="the machine is at version"):
            await agent.do(node.UpdateMachine, config=config(), image=IMAGE, current_version="01OLD")


async def test_a_stop_interrupts_a_pull(world: World) -> None:
    world.images.hold = anyio.Event()
    async with world.agent() as agent:
        await agent.create()
        await agent.until(lambda m: m.state == "starting")
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        assert world.driver.starts == {}


async def test_a_failed_start_says_why_and_can_be_tried_again(world: World) -> None:
    world.driver.behaviour = Behaviour(start_fails="exec /bin/app: no such file", guest_fault=True)
    async with world.agent() as agent:
        await agent.create()
        machine = await agent.until(lambda m: m.state == "launch_failed")
        assert story(machine)[-1] == ("start", "launch_failed")
        assert machine.events[0].request is not None
        assert "no such file" in (machine.events[0].request.reason or "")
        assert any("no such file" in line for _, line in world.logs.lines)
        world.driver.behaviour = Behaviour()
        await agent.do(node.StartMachine)
        await agent.wait("started")


async def test_restart(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        await agent.do(node.RestartMachine)
        await agent.until(lambda m: m.state == "started" and world.driver.starts[ID] == 2)
        assert ("restart", "restarting") in story(await agent.get())


async def test_secrets_reach_the_start_and_a_minimum_version_is_kept(world: World) -> None:
    def sealed(version: int, values: dict[str, str]) -> node.SealedSecrets:
        text = seal(world.node_key.public_key, msgspec.json.encode(values))
        return node.SealedSecrets(app=APP.name, version=version, sealed=text)

    async with world.agent() as agent:
        await agent.create(secrets=sealed(1, {"SESAME": "open-one"}), min_secrets_version=1)
        await agent.wait("started")
        await agent.call(node.PutSecrets(request_id="s", secrets=sealed(2, {"SESAME": "open-two"})))
        await agent.do(node.RestartMachine)
        await agent.until(lambda m: m.state == "started" and world.driver.starts[ID] == 2)
        start = world.driver.machines[ID].start
        assert start is not None
        assert start.env["SESAME"] == "open-two"
        await agent.create("aaaaaaaaaaaaaa", min_secrets_version=9)
        await agent.until(lambda m: m.state == "failed", "aaaaaaaaaaaaaa")
    content = b"".join(path.read_bytes() for path in world.folder.iterdir() if path.is_file())
    assert b"SESAME" not in content
    assert b"open-" not in content


# -- callers -------------------------------------------------------------------------------------------------------


async def test_a_repeated_request_is_answered_not_repeated(world: World) -> None:
    async with world.agent() as agent:
        wanted = node.CreateMachine(
            request_id="same",
            machine_id=ID,
            generation=1,
            app=APP,
            name="n",
            region="iad",
            config=config(),
            image=IMAGE,
            lease_ttl_s=60,
        )
        first = await agent.call(wanted)
        await agent.wait("started")
        assert await agent.call(wanted) == first
    async with world.agent() as agent:
        assert await agent.call(wanted) == first
        assert first.nonce


async def test_leases(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        with pytest.raises(NodeFailure, match="lease not found"):
            await agent.call(node.GetLease(machine_id=ID))
        lease = await agent.do(node.AcquireLease, ttl_s=60, owner="ann@example.test")
        with pytest.raises(NodeFailure, match=r"lease currently held by ann@example.test") as caught:
            await agent.do(node.AcquireLease, ttl_s=60, owner="bob@example.test")
        assert caught.value.error.http_code == 409
        with pytest.raises(NodeFailure, match="lease currently held by"):
            await agent.do(node.StopMachine)
        again = await agent.do(node.AcquireLease, ttl_s=60, owner="ann@example.test", nonce=lease.nonce)
        assert again.nonce == lease.nonce
        await agent.do(node.StopMachine, nonce=lease.nonce)
        await agent.wait("stopped")
        await agent.do(node.ReleaseLease, nonce=lease.nonce)
        await agent.do(node.StartMachine)
        with pytest.raises(NodeFailure, match="machine not found"):
            await agent.do(node.StopMachine, "ffffffffffffff")


async def test_cordon_and_metadata_make_no_new_version(world: World) -> None:
    async with world.agent() as agent:
        first = await agent.create()
        await agent.do(node.CordonMachine, cordoned=True)
        await agent.do(node.SetMetadata, key="role", value="primary")
        machine = await agent.get()
        assert machine.cordoned
        assert machine.config is not None
        assert machine.config.metadata == {"role": "primary"}
        assert machine.instance_id == first.instance_id
        assert world.rows.rows["routes", f"m/{ID}"]["cordoned"] is True


async def test_what_does_not_fit_is_refused_and_nothing_is_done(world: World) -> None:
    async with world.agent() as agent:
        for number in range(4):
            await agent.create(f"{number:014x}", config=config(guest=Guest(memory_mb=2048)))
        with pytest.raises(NodeFailure, match="0 MiB free on this host") as caught:
            await agent.create("ffffffffffffff")
        assert (caught.value.error.kind, caught.value.error.http_code) == ("CapacityError", 422)
        with pytest.raises(NodeFailure, match="machine not found"):
            await agent.get("ffffffffffffff")


async def test_a_request_that_nobody_waits_for_any_more_makes_nothing(world: World) -> None:
    async with world.agent() as agent:
        now_ms = unix_ms(world.clock.now())
        with pytest.raises(NodeFailure, match="too late") as caught:
            await agent.create(expires_at_ms=now_ms - 1)
        assert caught.value.error.kind == "NodeUnreachable"
        with pytest.raises(NodeFailure, match="machine not found"):
            await agent.get()
        await agent.create(expires_at_ms=now_ms + 60_000)
        await agent.wait("started")


async def test_started_and_suspended_machines_hold_room_and_stopped_ones_none(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=config(guest=Guest(cpus=2, memory_mb=1024)))
        await agent.wait("started")
        assert agent.host.used() == (0.125, 1024)
        await agent.do(node.SuspendMachine)
        await agent.wait("suspended")
        assert agent.host.used() == (0.125, 1024)
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        assert agent.host.used() == (0, 0)


async def test_invalid_requests_name_their_field(world: World) -> None:
    async with world.agent() as agent:
        with pytest.raises(NodeFailure, match=r"config\.services\[0\]\.internal_port: 99999"):
            await agent.create(config=config(services=[service(internal_port=99999)]))
        await agent.create()
        await agent.wait("started")
        with pytest.raises(NodeFailure, match="signal: 'SIGNOPE'"):
            await agent.do(node.StopMachine, signal="SIGNOPE")
        reply = msgspec.json.decode(await agent.api.call("", b"{}"), type=node.NodeReply)
        assert reply.error is not None


# -- health --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listens", "sentence"),
    [
        ((("127.0.0.1", 8080),), "the app listens on 127.0.0.1:8080; bind 0.0.0.0:8080"),
        (((Behaviour().listens[0][0], 5000),), "nothing listens on port 8080; the app listens on 0.0.0.0:5000"),
        ((), "nothing listens on port 8080 yet"),
    ],
)
async def test_an_app_on_the_wrong_address_is_named(
    world: World, listens: tuple[tuple[str, int], ...], sentence: str
) -> None:
    world.driver.behaviour = Behaviour(listens=listens)
    async with world.agent() as agent:
        await agent.create()
        machine = await agent.until(lambda m: ("listen", "wrong_address") in story(m))
        event = next(e for e in machine.events if e.type == "listen")
        assert event.request is not None
        assert sentence in (event.request.reason or "")
        assert any(sentence in line for _, line in world.logs.lines)
        processes = await agent.call(node.ListProcesses(machine_id=ID))
        assert [s.address for s in processes[1].listen_sockets] == [f"{a}:{p}" for a, p in listens]


async def test_service_checks_gate_and_report(world: World) -> None:
    world.prober.http_status = 500
    checked = service(checks=[Check(type="http", path="/up", interval="500ms", grace_period="0s")])
    asked = config(services=[checked], checks={"alive": Check(type="tcp", port=8080)})
    async with world.agent() as agent:
        await agent.create(config=asked)
        machine = await agent.until(lambda m: any(c.output == "500 from /up" for c in m.checks))
        assert [(c.name, c.status) for c in machine.checks] == [
            ("servicecheck-00-http-8080", "critical"),
            ("alive", "passing"),
        ]
        assert world.rows.rows["routes", f"m/{ID}"]["passing"] == [False]
        world.prober.http_status = 204
        await agent.until(lambda m: all(c.status == "passing" for c in m.checks))
        assert world.rows.rows["routes", f"m/{ID}"]["passing"] == [True]


async def test_an_update_is_answered_with_the_checks_that_its_caller_has_to_wait_for(world: World) -> None:
    """flyctl counts them in the answer, and waits until so many pass."""
    checked = service(checks=[Check(type="http", path="/up")])
    asked = config(services=[checked], checks={"alive": Check(type="tcp", port=8080)})
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        updated = await agent.do(node.UpdateMachine, config=asked, image=IMAGE)
        assert [(check.name, check.status) for check in updated.checks] == [
            ("servicecheck-00-http-8080", "critical"),
            ("alive", "critical"),
        ]
        await agent.wait("settled", version=updated.instance_id)
        assert [check.name for check in (await agent.get()).checks] == [check.name for check in updated.checks]
        await agent.do(node.StopMachine)
        await agent.wait("stopped")
        assert (await agent.do(node.UpdateMachine, config=asked, image=IMAGE)).checks == []


# -- one agent after another ---------------------------------------------------------------------------------------


async def test_a_new_agent_adopts_what_runs_without_touching_it(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
    runtime = world.driver.machines[ID]
    async with world.agent() as agent:
        await agent.until(lambda m: m.state == "started")
        await agent.until(lambda _: world.rows.rows["routes", f"m/{ID}"]["passing"] == [True])
        assert world.driver.machines[ID] is runtime
        assert world.driver.starts[ID] == 1
        world.driver.crash(ID)
        await agent.until(lambda m: m.state == "started" and world.driver.starts[ID] == 2)


async def test_an_app_whose_start_was_not_journaled_any_more_is_adopted_not_started_twice(world: World) -> None:
    journals: list[KillingJournal] = []

    def wrap(journal: Journal) -> KillingJournal:
        journals.append(KillingJournal(journal, at=5, after_write=False))
        return journals[0]

    async with world.agent(wrap) as agent:
        await agent.create()
        with anyio.fail_after(15):
            await journals[0].dead.wait()
        assert agent.host.machines[ID].record.state == "starting"
        assert world.driver.running() == {ID}
    async with world.agent() as agent:
        await agent.wait("started")
        assert world.driver.starts[ID] == 1


async def test_an_exit_while_no_agent_was_there_is_seen_by_the_next(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=config(restart=Restart(policy="no")))
        await agent.wait("started")
    world.driver.crash(ID, exit_code=7)
    async with world.agent() as agent:
        machine = await agent.until(lambda m: m.state == "stopped")
        exited = next(e for e in machine.events if e.type == "exit")
        assert exited.request is not None
        assert exited.request.exit_event is not None
        assert exited.request.exit_event.exit_code == 7


async def test_after_the_host_was_reset_machines_come_back(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
    world.driver.machines.clear()
    world.network.plans.clear()
    async with world.agent() as agent:
        await agent.until(lambda m: m.state == "started" and world.driver.running() == {ID})


async def test_what_belongs_to_nobody_is_removed(world: World) -> None:
    async with world.agent() as agent:
        await agent.create("aaaaaaaaaaaaaa")
        await agent.wait("started", machine_id="aaaaaaaaaaaaaa")
    (world.folder / "journal.db").unlink()
    async with world.agent():
        assert world.driver.machines == {}
        assert world.network.plans == {}
        assert world.rows.rows == {}


async def test_a_standby_says_for_whom_it_was_started_and_that_nobody_asked(world: World) -> None:
    async with world.agent() as agent:
        await agent.create(config=config(services=[], standbys=["11111111111111"]), skip_launch=True)
        await agent.wait("settled")
        await agent.do(node.StartMachine, stands_for="11111111111111")
        await agent.wait("started")
        told = [(e.type, e.status, e.source, e.request.reason if e.request else "") for e in (await agent.get()).events]
        assert ("standby", "takes over", "flyd", "the host of 11111111111111 is lost") in told
        assert ("start", "starting", "flyd") in [line[:3] for line in told]


async def test_a_restart_of_the_policy_is_nobody_else_s_wish_and_says_when(tmp_path: Path) -> None:
    world = World(tmp_path, pace=msgspec.structs.replace(FAST, restart_scale=1000.0))
    async with world.agent() as agent:
        await agent.create()
        await agent.wait("started")
        world.driver.crash(ID, exit_code=3)
        progress = (await agent.until(lambda m: m.state == "restarting" and m.progress is not None)).progress
        assert progress is not None
        assert progress.asked_by == "flyd"
        assert progress.waits_for.startswith("exited with code 3; it is started again at 2")
