"""The Machines API against `reference`: fields, codes, texts that clients match, leases, waits, placement."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from golden import check

from pantala.errors import CapacityError, InternalError
from pantala.testing.fake_registry import claims_of
from pantala.testing.platform import TestPlatform
from pantala.testing.poll import until
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

IMAGE = "registry.pantala.test/web:v1"
MACHINES = "/v1/apps/web/machines"


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


def launch(**config: Any) -> dict[str, Any]:
    return {"config": {"image": IMAGE} | config}


async def test_create_get_list_destroy(web: TestPlatform) -> None:
    service = {
        "protocol": "tcp",
        "internal_port": 8080,
        "autostop": "stop",
        "autostart": True,
        "force_instance_key": None,
        "ports": [{"port": 443, "handlers": ["tls", "http"]}],
    }
    body = launch(init={}, services=[service], env={"A": "1"}, guest={"cpus": 1, "memory_mb": 256})
    made = await web.http.post(MACHINES, json=body, headers=web.auth)
    check("machine_create", made)
    machine = f"{MACHINES}/{made.json()['id']}"
    check("machine_get", await web.http.get(machine, headers=web.auth))
    check("machine_list", await web.http.get(MACHINES, headers=web.auth))
    check("machine_destroy_started", await web.http.delete(machine, headers=web.auth))
    check("machine_destroy", await web.http.delete(f"{machine}?kill=true", headers=web.auth))
    assert (await web.http.get(MACHINES, headers=web.auth)).json() == []
    assert (await web.http.get(machine, headers=web.auth)).json()["state"] == "destroyed"
    deleted = await web.http.get(f"{MACHINES}?include_deleted=true", headers=web.auth)
    assert [found["state"] for found in deleted.json()] == ["destroyed"]


async def test_operations_answer_what_clients_read(web: TestPlatform) -> None:
    machine = f"{MACHINES}/{(await web.create_machine('web'))['id']}"
    check("machine_stop", await web.http.post(f"{machine}/stop", json={"id": "", "timeout": "0s"}, headers=web.auth))
    check("machine_start", await web.http.post(f"{machine}/start", headers=web.auth))
    check("machine_restart", await web.http.post(f"{machine}/restart?timeout=10s", headers=web.auth))
    check("machine_cordon", await web.http.post(f"{machine}/cordon", headers=web.auth))
    assert (await web.http.get(machine, headers=web.auth)).json()["cordoned"] is True
    await web.http.post(f"{machine}/uncordon", headers=web.auth)
    assert (await web.http.get(machine, headers=web.auth)).json()["cordoned"] is False
    check("machine_events", await web.http.get(f"{machine}/events?limit=2", headers=web.auth))
    check("machine_ps", await web.http.get(f"{machine}/ps", headers=web.auth))
    assert (await web.http.post(f"{machine}/stop", headers=web.auth)).status_code == 200


async def test_metadata(web: TestPlatform) -> None:
    made = await web.http.post(MACHINES, json=launch(metadata={"a": "1"}), headers=web.auth)
    machine = f"{MACHINES}/{made.json()['id']}"
    answer = await web.http.post(f"{machine}/metadata/role", json={"value": "leader"}, headers=web.auth)
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await web.http.delete(f"{machine}/metadata/a", headers=web.auth)).status_code == 204
    assert (await web.http.get(f"{machine}/metadata", headers=web.auth)).json() == {"role": "leader"}
    assert (await web.http.get(f"{machine}/metadata/role", headers=web.auth)).json() == {"value": "leader"}
    now = (await web.http.get(machine, headers=web.auth)).json()
    assert now["config"]["metadata"] == {"role": "leader"}
    assert now["instance_id"] == made.json()["instance_id"]
    assert len((await web.http.get(f"{MACHINES}?metadata.role=leader", headers=web.auth)).json()) == 1
    assert (await web.http.get(f"{MACHINES}?metadata.role=follower", headers=web.auth)).json() == []


async def test_unknown_config_fields_are_kept_and_given_back_until_they_are_replaced(web: TestPlatform) -> None:
    body = launch(new_thing={"deep": [1]}, services=[{"internal_port": 80, "protocol": "tcp", "odd": True}])
    made = await web.http.post(MACHINES, json=body, headers=web.auth)
    machine = f"{MACHINES}/{made.json()['id']}"
    for answer in (made.json(), (await web.http.get(machine, headers=web.auth)).json()):
        assert answer["config"]["new_thing"] == {"deep": [1]}
        assert answer["config"]["services"][0]["odd"] is True
    updated = await web.http.post(machine, json=launch(), headers=web.auth)
    assert "new_thing" not in updated.json()["config"]
    assert "new_thing" not in (await web.http.get(machine, headers=web.auth)).json()["config"]


async def test_update_makes_a_new_version_and_guards_lost_updates(web: TestPlatform) -> None:
    made = await web.create_machine("web")
    machine = f"{MACHINES}/{made['id']}"
    first = await web.http.post(
        machine, json=launch(env={"V": "2"}) | {"current_version": made["instance_id"]}, headers=web.auth
    )
    assert first.json()["instance_id"] != made["instance_id"]
    second = await web.http.post(machine, json=launch() | {"current_version": made["instance_id"]}, headers=web.auth)
    assert second.status_code == 412
    renamed = await web.http.post(machine, json=launch() | {"name": "other"}, headers=web.auth)
    assert (renamed.status_code, renamed.json()["error"][:6]) == (400, "name: ")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"config": {}}, "config.image"),
        (launch(services=[{"internal_port": "80"}]), "config.services[0].internal_port"),
        (
            launch(services=[{"internal_port": 80, "protocol": "tcp"}, {"internal_port": 70000, "protocol": "tcp"}]),
            "config.services[1].internal_port",
        ),
        (launch(env={"A": 1}), "config.env[...]"),
        (launch() | {"region": "xyz"}, "region"),
        (launch() | {"name": "no spaces"}, "name"),
        (launch() | {"lease_ttl": -1}, "lease_ttl"),
        (launch() | {"min_secrets_version": 9}, "min_secrets_version"),
    ],
    ids=["empty", "image", "type", "range", "env", "region", "name", "lease", "secrets"],
)
async def test_bad_configs_name_the_field_and_change_nothing(
    web: TestPlatform, body: dict[str, Any], field: str
) -> None:
    answer = await web.http.post(MACHINES, json=body, headers=web.auth)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].startswith(f"{field}: "), answer.text
    assert web.agents["node-1"].machines == {}
    assert (await web.http.get(MACHINES, headers=web.auth)).json() == []


async def test_broken_and_oversized_json_are_refused(web: TestPlatform) -> None:
    for content in (b'{"config":', b"\xff\xfe", b"[" * 100):
        answer = await web.http.post(MACHINES, content=content, headers=web.auth)
        assert (answer.status_code, answer.json()["error"][:6]) == (400, "body: "), answer.text
    answer = await web.http.post(MACHINES, content=b" " * (1024 * 1024 + 1), headers=web.auth)
    assert (answer.status_code, answer.json()["error"]) == (400, "body: is larger than 1048576 bytes")


async def test_an_image_that_is_not_there_or_not_mine_names_config_image(web: TestPlatform) -> None:
    web.registry.missing.add(IMAGE)
    check("machine_image_missing", await web.http.post(MACHINES, json=launch(), headers=web.auth))
    others = await web.admin("eve@example.com", "evil")
    await web.http.post("/v1/apps", json={"app_name": "spy", "org_slug": "evil"}, headers=others)
    web.registry.missing.clear()
    answer = await web.http.post("/v1/apps/spy/machines", json=launch(), headers=others)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("config.image: image not found")


async def test_a_base_whose_registry_is_not_in_reach_comes_from_our_own(web: TestPlatform) -> None:
    web.registry.unreachable = ("busybox", "docker.io", "other")
    body = launch() | {"config": {"image": "busybox:1.35"}}
    answer = await web.http.post(MACHINES, json=body, headers=web.auth)
    assert answer.status_code == 200, answer.text
    (base,) = [image for image in web.registry.tokens if image.endswith("/library/busybox:1.35")]
    assert claims_of(web.registry.tokens[base])["access"][0]["name"] == "library/busybox"
    body["config"] = {"image": "other/busybox:1.35"}
    answer = await web.http.post(MACHINES, json=body, headers=web.auth)
    assert "does not answer" in answer.json()["error"]


async def test_the_host_gets_a_digest_a_pull_token_and_the_request_s_switches(web: TestPlatform) -> None:
    body = launch() | {"skip_launch": True, "skip_service_registration": True, "lease_ttl": 30}
    made = await web.http.post(MACHINES, json=body, headers=web.auth)
    call = web.agents["node-1"].calls[-1]
    assert isinstance(call, wire.CreateMachine)
    assert call.image.digest.startswith("sha256:")
    assert claims_of(call.pull_token)["access"] == [{"type": "repository", "name": "web", "actions": ["pull"]}]
    assert (call.skip_launch, call.cordoned, call.generation, call.app.network) == (True, True, 1, 1)
    assert (made.json()["state"], made.json()["cordoned"]) == ("created", True)
    assert made.json()["nonce"].startswith("nonce_")


# -- leases and waits --------------------------------------------------------------------------------------------


async def test_leases(web: TestPlatform) -> None:
    machine = f"{MACHINES}/{(await web.create_machine('web'))['id']}"
    check("lease_none", await web.http.get(f"{machine}/lease", headers=web.auth))
    made = await web.http.post(f"{machine}/lease?ttl=13", headers=web.auth)
    check("lease_create", made)
    nonce = web.auth | {"fly-machine-lease-nonce": made.json()["data"]["nonce"]}
    again = await web.http.post(f"{machine}/lease", json={"ttl": 30, "description": "x"}, headers=nonce)
    assert again.json()["data"]["nonce"] == made.json()["data"]["nonce"]
    assert again.json()["status"] == "success"
    assert again.json()["data"]["expires_at"] > made.json()["data"]["expires_at"]
    for method, path in (("POST", "/stop"), ("POST", "/lease"), ("POST", "/cordon"), ("DELETE", "?force=true")):
        held = await web.http.request(method, f"{machine}{path}", headers=web.auth)
        assert (held.status_code, held.json()["status"]) == (409, "lease_held"), path
        assert held.json()["error"].startswith("lease currently held by ada@example.com")
    assert (await web.http.post(machine, json=launch(), headers=web.auth)).status_code == 409
    assert (await web.http.post(f"{machine}/stop", headers=nonce)).status_code == 200
    assert (await web.http.delete(f"{machine}/lease", headers=web.auth)).status_code == 400
    assert (await web.http.delete(f"{machine}/lease", headers=nonce)).status_code == 200
    assert (await web.http.get(f"{machine}/lease", headers=web.auth)).status_code == 404


async def test_wait_codes(web: TestPlatform) -> None:
    machine_id = (await web.create_machine("web"))["id"]
    wait = f"{MACHINES}/{machine_id}/wait"
    check("wait_reached", await web.http.get(wait, headers=web.auth))
    check("wait_timeout", await web.http.get(f"{wait}?state=stopped&timeout=1", headers=web.auth))
    several = await web.http.get(f"{wait}?state=stopped&state=started&timeout=1", headers=web.auth)
    assert several.json()["state"] == "started"
    assert (await web.http.get(f"{wait}?state=settled", headers=web.auth)).status_code == 200
    for query, field in (("state=sleepy", "state"), ("timeout=61", "timeout"), ("timeout=0", "timeout")):
        bad = await web.http.get(f"{wait}?{query}", headers=web.auth)
        assert (bad.status_code, bad.json()["error"].partition(":")[0]) == (400, field)
    nanoseconds = await web.http.get(f"{wait}?timeout=1000000000", headers=web.auth)
    assert nanoseconds.json()["error"] == "timeout: must be 1 to 60 seconds"
    missing = await web.http.get(f"{MACHINES}/00000000000000/wait", headers=web.auth)
    assert (missing.status_code, missing.json()["error"]) == (404, "machine not found")


async def test_a_wait_ends_when_the_state_comes(web: TestPlatform) -> None:
    machine_id = (await web.create_machine("web"))["id"]
    answers: list[Any] = []

    async def wait() -> None:
        answers.append(await web.http.get(f"{MACHINES}/{machine_id}/wait?state=stopped", headers=web.auth))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        web.agents["node-1"].crash(machine_id, code=3)
    assert answers[0].json()["state"] == "stopped"


# -- placement ---------------------------------------------------------------------------------------------------


async def test_machines_spread_and_go_where_they_are_asked_to(web: TestPlatform) -> None:
    await web.add_agent("node-2")
    await web.add_agent("node-3", region="lhr")
    nodes = [(await web.create_machine("web"))["node"] for _ in range(2)]
    assert sorted(nodes) == ["node-1", "node-2"]
    assert (await web.create_machine("web", region="lhr"))["node"] == "node-3"
    assert (await web.create_machine("web", region="eu"))["region"] == "lhr"
    listed = await web.http.get(f"{MACHINES}?region=lhr", headers=web.auth)
    assert {machine["region"] for machine in listed.json()} == {"lhr"}


async def test_nowhere_to_go_is_insufficient_capacity_with_counts(web: TestPlatform) -> None:
    await web.add_agent("node-2", region="lhr")
    body = launch(guest={"cpu_kind": "performance", "cpus": 2, "memory_mb": 16384}) | {"region": "iad"}
    check("machine_no_capacity", await web.http.post(MACHINES, json=body, headers=web.auth))
    assert web.agents["node-1"].machines == {}


async def test_a_host_that_refuses_or_is_silent_is_passed_over(web: TestPlatform) -> None:
    second = await web.add_agent("node-2")
    web.agents["node-1"].fail_next[wire.CreateMachine] = CapacityError("just filled up")
    second.fail_next[wire.CreateMachine] = CapacityError("me too")
    third = await web.add_agent("node-3")
    assert (await web.create_machine("web"))["node"] == "node-3"
    assert len(third.machines) == 1
    assert len((await web.http.get(MACHINES, headers=web.auth)).json()) == 1


async def test_a_creation_whose_answer_is_lost_leaves_no_machine(web: TestPlatform) -> None:
    agent = web.agents["node-1"]
    await web.control.nodes.fleet()  # known to be there, a moment ago
    agent.lose_answers = True
    answer = await web.http.post(MACHINES, json=launch(), headers=web.auth)
    assert answer.status_code not in (502, 503)
    assert answer.status_code >= 400
    assert len(agent.machines) == 1, "sent again with the same request id, made once"
    agent.lose_answers = False
    await web.control.sweep.cycle()
    assert [machine.state for machine in agent.machines.values()] == ["destroyed"]
    assert (await web.http.get(f"{MACHINES}?include_deleted=true", headers=web.auth)).json() == []


async def test_a_machine_name_is_unique_in_its_app_while_it_lives(web: TestPlatform) -> None:
    first = await web.create_machine("web", name="one")
    again = await web.http.post(MACHINES, json=launch() | {"name": "one"}, headers=web.auth)
    assert (again.status_code, again.json()["status"]) == (422, "name_taken")
    await web.http.delete(f"{MACHINES}/{first['id']}?force=true", headers=web.auth)
    second = await web.create_machine("web", name="one", config={"image": IMAGE, "auto_destroy": True})
    web.agents["node-1"].crash(second["id"], code=0)
    assert (await web.create_machine("web", name="one"))["name"] == "one"


async def test_an_unreachable_host_shows_as_such_and_is_never_502(web: TestPlatform) -> None:
    made = await web.create_machine("web", config={"image": IMAGE, "env": {"A": "1"}, "odd": 1})
    machine = f"{MACHINES}/{made['id']}"
    web.agents["node-1"].silent = True
    check("machine_unreachable", await web.http.get(machine, headers=web.auth))
    listed = (await web.http.get(MACHINES, headers=web.auth)).json()
    assert [(found["host_status"], found["state"]) for found in listed] == [("unreachable", "started")]
    for method, path in (("POST", "/stop"), ("POST", "/start"), ("GET", "/wait?timeout=1"), ("DELETE", "")):
        answer = await web.http.request(method, f"{machine}{path}", headers=web.auth)
        assert (answer.status_code, answer.json()["status"]) == (500, "unavailable"), path
    assert (await web.http.delete(f"{machine}?force=true", headers=web.auth)).status_code == 200
    assert (await web.http.get(MACHINES, headers=web.auth)).json() == []
    web.agents["node-1"].silent = False
    await web.control.sweep.cycle()
    assert web.agents["node-1"].machines[made["id"]].state == "destroyed"


async def test_an_internal_error_shows_an_incident_and_nothing_else(web: TestPlatform) -> None:
    made = await web.create_machine("web")
    web.agents["node-1"].fail_next[wire.StopMachine] = InternalError("stack trace of /var/lib/secret")
    answer = await web.http.post(f"{MACHINES}/{made['id']}/stop", headers=web.auth)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["fly-request-id"] in answer.json()["error"]


async def test_an_update_that_finds_no_room_uses_the_text_that_clients_match(web: TestPlatform) -> None:
    made = await web.create_machine("web")
    web.agents["node-1"].fail_next[wire.UpdateMachine] = CapacityError("full")
    answer = await web.http.post(f"{MACHINES}/{made['id']}", json=launch(), headers=web.auth)
    assert "could not reserve resource for machine" in answer.json()["error"]
    assert answer.json()["status"] == "insufficient_capacity"


async def test_machines_that_are_not_launched_take_no_room(web: TestPlatform) -> None:
    """Control remembers what it sent to a node that has said nothing new since."""
    guest = {"cpu_kind": "performance", "cpus": 1, "memory_mb": 2048}
    body = launch(guest=guest) | {"region": "iad"}
    web.agents["node-1"].memory_mib = 1 << 20
    web.agents["node-1"].cpus = room = 4
    web.sightings.tell("node-1")
    web.sightings.freeze("node-1")
    for _ in range(room + 1):
        answer = await web.http.post(MACHINES, json=body | {"skip_launch": True}, headers=web.auth)
        assert answer.status_code == 200, answer.text


async def test_room_that_was_left_a_moment_ago_is_found(web: TestPlatform) -> None:
    """Rows are seconds old: before a creation is refused the host is asked what it has free now."""
    body = launch(guest={"cpu_kind": "performance", "cpus": 2, "memory_mb": 4096}) | {"region": "iad"}
    web.agents["node-1"].cpus = 4
    web.sightings.tell("node-1")
    web.sightings.freeze("node-1")
    made = [(await web.http.post(MACHINES, json=body, headers=web.auth)).json() for _ in range(2)]
    full = await web.http.post(MACHINES, json=body, headers=web.auth)
    assert (full.status_code, full.json()["status"]) == (422, "insufficient_capacity")
    assert (await web.http.delete(f"{MACHINES}/{made[0]['id']}?force=true", headers=web.auth)).status_code == 200

    async def tried_again() -> int:
        return (await web.http.post(MACHINES, json=body, headers=web.auth)).status_code

    await until(tried_again, lambda code: code == 200, within_s=15)
