"""Hosts are drained, removed and lost: machines move without a copy too many, and what cannot move says why."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pantala.control.context import ControlSettings
from pantala.control.service import Control
from pantala.errors import CapacityError
from pantala.store import moves
from pantala.testing.clock import ManualClock
from pantala.testing.platform import SETTINGS, TestPlatform, running
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

MACHINES = "/v1/apps/web/machines"
SERVICES = [{"protocol": "tcp", "internal_port": 8080, "ports": [{"port": 80}]}]


@pytest.fixture
async def web(tmp_path: Path) -> AsyncGenerator[TestPlatform]:
    """Two hosts in iad, one in lhr; the app web."""
    async with running(tmp_path, clock=ManualClock()) as platform:
        await platform.add_agent("node-2")
        await platform.add_agent("lhr-1", region="lhr")
        await platform.create_app("web")
        yield platform


async def machine_on(web: TestPlatform, node: str, **config: Any) -> str:
    """A machine of web, placed on a node although others have more room."""
    others = [agent for name, agent in web.agents.items() if name != node]
    for agent in others:
        agent.fail_next[wire.CreateMachine] = CapacityError("busy")
    body = {"image": "registry.pantala.test/web:v1", "services": SERVICES} | config
    made = await web.create_machine("web", config=body, region=web.agents[node].region)
    for agent in others:
        agent.fail_next.clear()
    assert made["node"] == node
    return str(made["id"])


async def call(web: TestPlatform, method: str, path: str, *, code: int = 200, **more: Any) -> Any:
    answer = await web.http.request(method, f"/v1/hosts/{path}", headers=web.auth, **more)
    assert answer.status_code == code, answer.text
    return answer.json()


async def cycles(web: TestPlatform, number: int = 12) -> None:
    for _ in range(number):
        await web.control.moves.cycle()


def copies(web: TestPlatform, machine_id: str) -> dict[str, str]:
    """Node to state."""
    return {
        name: agent.machines[machine_id].state.value
        for name, agent in web.agents.items()
        if machine_id in agent.machines
    }


async def shown(web: TestPlatform, machine_id: str) -> dict[str, Any]:
    return (await web.http.get(f"{MACHINES}/{machine_id}", headers=web.auth)).json()


# -- draining --------------------------------------------------------------------------------------------------------


async def test_a_drained_host_s_machines_move_within_their_region(web: TestPlatform) -> None:
    running_one = await machine_on(web, "node-1", env={"A": "1"})
    stopped = await machine_on(web, "node-1")
    await web.http.post(f"{MACHINES}/{stopped}/stop", headers=web.auth)
    seen = await call(web, "POST", "node-1/drain")
    assert seen["status"] == "draining"
    assert web.rows.rows["member/node-1"]["status"] == "draining"
    await cycles(web)
    assert copies(web, running_one) == {"node-1": "migrated", "node-2": "started"}
    assert copies(web, stopped) == {"node-1": "migrated", "node-2": "stopped"}
    assert (await call(web, "GET", "node-1/drain"))["machines"] == []
    document = await shown(web, running_one)
    assert (document["node"], document["state"], document["config"]["env"]) == ("node-2", "started", {"A": "1"})
    assert web.agents["node-2"].machines[running_one].generation == 2
    assert not await web.db.read(moves.list_moves)
    assert (await web.create_machine("web", region="iad"))["node"] == "node-2", "no new machines"
    await call(web, "POST", "node-1/drain", json={"undo": True})
    assert (await web.create_machine("web", region="iad"))["node"] == "node-1"


async def test_the_old_copy_serves_until_the_new_one_is_shown(web: TestPlatform) -> None:
    """At each step one copy is shown, and it is started."""
    machine_id = await machine_on(web, "node-1")
    web.agents["node-2"].accepts = False
    await call(web, "POST", "node-1/drain")
    await cycles(web, 4)
    assert copies(web, machine_id) == {"node-1": "started", "node-2": "started"}
    assert web.agents["node-2"].row(machine_id) is None, "not ready, so nobody is told"
    busy = await web.http.post(f"{MACHINES}/{machine_id}/stop", headers=web.auth)
    assert (busy.status_code, busy.json()["status"]) == (409, "lease_held")
    copy = web.agents["node-2"].machines[machine_id]
    copy.events.insert(0, msgspec.structs.replace(copy.events[0], type="ready"))
    for _ in range(6):
        row = web.sightings.machine(machine_id)
        assert row is not None
        assert row.state == "started"
        await web.control.moves.cycle()
    assert copies(web, machine_id) == {"node-1": "migrated", "node-2": "started"}


async def test_without_room_in_its_region_a_machine_goes_where_its_app_is(web: TestPlatform) -> None:
    machine_id = await machine_on(web, "node-1")
    web.agents["node-2"].memory_mib = 0
    web.agents["node-2"].on_change()
    await call(web, "POST", "node-1/drain")
    await cycles(web)
    left = (await call(web, "GET", "node-1/drain"))["machines"]
    assert [(machine["id"], machine["state"]) for machine in left] == [(machine_id, "stays")]
    assert "1 without enough free memory" in left[0]["reason"]
    await machine_on(web, "lhr-1")
    await cycles(web)
    assert (await shown(web, machine_id))["region"] == "lhr"
    assert copies(web, machine_id) == {"node-1": "migrated", "lhr-1": "started"}


async def test_a_copy_that_does_not_come_up_is_taken_back(web: TestPlatform) -> None:
    machine_id = await machine_on(web, "node-1")
    web.agents["node-2"].exit_at_start = 1
    await call(web, "POST", "node-1/drain")
    await cycles(web, 8)
    assert copies(web, machine_id) == {"node-1": "started", "node-2": "migrated"}
    left = (await call(web, "GET", "node-1/drain"))["machines"]
    assert left[0]["reason"]
    assert (await web.http.post(f"{MACHINES}/{machine_id}/stop", headers=web.auth)).status_code == 200


async def test_a_leased_machine_waits_for_the_end_of_the_lease(web: TestPlatform) -> None:
    machine_id = await machine_on(web, "node-1")
    lease = (await web.http.post(f"{MACHINES}/{machine_id}/lease", headers=web.auth)).json()
    await call(web, "POST", "node-1/drain")
    await cycles(web)
    assert copies(web, machine_id) == {"node-1": "started"}
    nonce = {"fly-machine-lease-nonce": lease["data"]["nonce"]}
    await web.http.delete(f"{MACHINES}/{machine_id}/lease", headers=web.auth | nonce)
    await cycles(web)
    assert copies(web, machine_id) == {"node-1": "migrated", "node-2": "started"}


async def test_a_control_plane_that_dies_anywhere_goes_on(web: TestPlatform, tmp_path: Path) -> None:
    machine_id = await machine_on(web, "node-1")
    await call(web, "POST", "node-1/drain")
    for _ in range(12):
        await web.control.moves.cycle()
        web.control.moves = another_life(web, tmp_path).moves
    assert copies(web, machine_id) == {"node-1": "migrated", "node-2": "started"}


def another_life(web: TestPlatform, folder: Path) -> Control:
    return Control(
        web.control.context,
        sink=web.rows,
        registry=web.registry,
        builder=web.builder,
        state_dir=folder,
        sightings=web.sightings,
        control_key="",
    )


# -- removed and lost ------------------------------------------------------------------------------------------------


async def test_a_host_with_machines_is_not_removed(web: TestPlatform) -> None:
    await machine_on(web, "node-1")
    told = await call(web, "DELETE", "node-1", code=409)
    assert told["error"].startswith("node-1 has 1 machine (")
    await call(web, "POST", "node-1/drain")
    await cycles(web)
    assert (await call(web, "DELETE", "node-1"))["status"] == "removed"
    assert "member/node-1" not in web.rows.rows
    hosts = {host["id"]: host for host in (await web.http.get("/v1/hosts", headers=web.auth)).json()}
    assert (hosts["node-1"]["status"], hosts["node-1"]["machines"]) == ("removed", 0)
    assert (await call(web, "POST", "node-1/drain", code=409))["error"].startswith("node-1 is removed")
    assert "no host nowhere" in (await call(web, "DELETE", "nowhere", code=404))["error"]


async def test_a_lost_host_s_machines_come_back_elsewhere_started_ones_first(web: TestPlatform) -> None:
    stopped = await machine_on(web, "node-1")
    await web.http.post(f"{MACHINES}/{stopped}/stop", headers=web.auth)
    started = await machine_on(web, "node-1")
    web.agents["node-1"].silent = True
    seen = await call(web, "POST", "node-1/lost")
    assert (seen["status"], len(seen["machines"])) == ("lost", 2)
    await cycles(web, 6)
    assert copies(web, started) == {"node-1": "started", "node-2": "started"}, "nobody can reach the lost one"
    assert copies(web, stopped) == {"node-1": "stopped", "node-2": "stopped"}
    assert list(web.agents["node-2"].machines) == [started, stopped]
    assert (await shown(web, started))["host_status"] == "ok"
    row = web.agents["node-2"].row(started)
    assert row is not None
    assert row.generation == 2
    assert (await call(web, "GET", "node-1/drain"))["machines"] == []


async def test_a_machine_with_a_volume_stays_lost_and_says_so(web: TestPlatform) -> None:
    machine_id = await machine_on(web, "node-1")
    config = msgspec.json.encode({"mounts": [{"volume": "vol_1", "path": "/data"}]}).decode()
    await web.db.write(lambda c: c.exec_driver_sql("UPDATE placements SET config = ?", (config,)))
    await call(web, "POST", "node-1/drain")
    await cycles(web)
    left = (await call(web, "GET", "node-1/drain"))["machines"]
    assert [(m["state"], m["reason"]) for m in left] == [("stays", "it has a volume on this host")]
    web.agents["node-1"].silent = True
    seen = await call(web, "POST", "node-1/lost")
    assert [(m["state"], m["reason"]) for m in seen["machines"]] == [("stays", "it had a volume on this host")]
    await cycles(web)
    assert copies(web, machine_id) == {"node-1": "started"}
    assert (await shown(web, machine_id))["host_status"] == "unreachable"


async def test_a_host_lost_while_it_is_drained_leaves_one_copy(web: TestPlatform) -> None:
    for steps in range(1, 8):
        node = await web.add_agent(f"node-x{steps}")
        machine_id = await machine_on(web, node.node)
        await call(web, "POST", f"{node.node}/drain")
        await cycles(web, steps)
        node.silent = True
        await call(web, "POST", f"{node.node}/lost")
        await cycles(web, 12)
        live = {name: state for name, state in copies(web, machine_id).items() if name != node.node}
        assert sorted(live.values()).count("started") == 1, (steps, live)
        assert not await web.db.read(moves.list_moves)


async def test_only_operators_may(web: TestPlatform) -> None:
    stranger = await web.admin("eve@example.com", "evil")
    for method, path in (("POST", "node-1/drain"), ("POST", "node-1/lost"), ("DELETE", "node-1")):
        answer = await web.http.request(method, f"/v1/hosts/{path}", headers=stranger)
        assert answer.status_code == 404
    assert web.rows.rows["member/node-1"]


# -- choosing --------------------------------------------------------------------------------------------------------


async def test_a_refusal_that_nobody_expected_goes_to_the_next_host(web: TestPlatform) -> None:
    web.sightings.freeze("node-1")
    web.agents["node-1"].memory_mib = 0
    assert (await web.create_machine("web", region="iad"))["node"] == "node-2"


async def test_what_was_just_sent_counts_before_the_node_says_so(web: TestPlatform) -> None:
    web.sightings.freeze("node-1")
    web.sightings.freeze("node-2")
    body = {"image": "registry.pantala.test/web:v1", "guest": {"cpus": 2, "cpu_kind": "shared", "memory_mb": 4096}}
    nodes = [(await web.create_machine("web", region="iad", config=body))["node"] for _ in range(4)]
    assert sorted(nodes) == ["node-1", "node-1", "node-2", "node-2"]
    full = await web.http.post(MACHINES, json={"config": body, "region": "iad"}, headers=web.auth)
    assert (full.status_code, full.json()["status"]) == (422, "insufficient_capacity")
    assert "1 in another region; 2 without enough free memory" in full.json()["error"]
    web.agents["node-2"].memory_mib = 1 << 20
    assert isinstance(web.control.context.clock, ManualClock)
    await web.control.context.clock.advance(1)  # it is not asked what it has more often
    assert (await web.create_machine("web", region="iad", config=body))["node"] == "node-2"


async def test_a_silent_host_is_not_tried(web: TestPlatform) -> None:
    web.agents["node-1"].silent = True
    assert (await web.create_machine("web", region="iad"))["node"] == "node-2"
    web.agents["node-2"].silent = True
    answer = await web.http.post(MACHINES, json={"config": {"image": "i"}, "region": "iad"}, headers=web.auth)
    assert "1 in another region; 2 not answering" in answer.json()["error"]


async def test_a_host_that_was_told_to_speak_seldom_is_not_taken_for_silent(tmp_path: Path) -> None:
    settings: ControlSettings = msgspec.structs.replace(SETTINGS, beat_s=25.0)
    async with running(tmp_path, clock=ManualClock(), settings=settings) as platform:
        platform.agents["node-1"].silent = True  # for a minute
        hosts = await platform.http.get("/v1/hosts", headers=platform.auth)
        assert [host["reachable"] for host in hosts.json()] == [True]


async def test_orgs_do_not_share_a_kernel_unasked(tmp_path: Path) -> None:
    settings: ControlSettings = msgspec.structs.replace(SETTINGS, shared_kernel=False)
    async with running(tmp_path, clock=ManualClock(), settings=settings) as platform:
        await platform.create_app("web")
        await platform.create_machine("web")
        theirs = await platform.admin("eve@example.com", "evil")
        await platform.http.post("/v1/apps", json={"app_name": "other", "org_slug": "evil"}, headers=theirs)
        body = {"config": {"image": "docker.io/library/nginx:1"}, "region": "iad"}
        refused = await platform.http.post("/v1/apps/other/machines", json=body, headers=theirs)
        assert "1 whose kernel another organisation uses" in refused.json()["error"]
        await platform.add_agent("vm-1", isolation="vm")
        made = await platform.http.post("/v1/apps/other/machines", json=body, headers=theirs)
        assert made.json()["node"] == "vm-1"


async def test_an_unknown_region_names_the_nearest(web: TestPlatform) -> None:
    answer = await web.http.post(MACHINES, json={"config": {"image": "i"}, "region": "jfk"}, headers=web.auth)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("region: there is no region 'jfk'; the nearest that exist are ewr")
