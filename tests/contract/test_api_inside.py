"""What is asked of a machine that runs: exec, signal, ps, suspend, versions, memory, leases in lists.

Shapes, names and codes: flyctl-protocol reference, sections 4.3, 4.6 and 4.13; machines-openapi.yaml.
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pantala.errors import NodeUnreachable
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.platform import TestPlatform
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

MACHINES = "/v1/apps/web/machines"


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


async def machine_of(web: TestPlatform) -> tuple[str, FakeAgent]:
    return f"{MACHINES}/{(await web.create_machine('web'))['id']}", web.agents["node-1"]


# -- exec ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "argv"),
    [
        ({"command": ["sh", "-c", "echo $HOME"]}, ["sh", "-c", "echo $HOME"]),
        ({"cmd": "sh -c 'echo a b'"}, ["sh", "-c", "echo a b"]),
        ({"cmd": 'echo "x y" z'}, ["echo", "x y", "z"]),
    ],
    ids=["command", "cmd-single", "cmd-double"],
)
async def test_exec_runs_what_was_asked_for(web: TestPlatform, body: dict[str, Any], argv: list[str]) -> None:
    machine, agent = await machine_of(web)
    agent.executed = wire.ExecResult(
        exit_code=3, signal=0, stdout_base64=base64.b64encode(b"out\xff").decode(), stderr_base64="ZXJy"
    )
    answer = await web.http.post(
        f"{machine}/exec", json=body | {"stdin": "in", "timeout": 5, "container": "side"}, headers=web.auth
    )
    assert answer.status_code == 200
    told = answer.json()
    assert {key: told[key] for key in ("exit_code", "exit_signal", "stdout", "stderr")} == {
        "exit_code": 3,
        "exit_signal": 0,
        "stdout": "out\N{REPLACEMENT CHARACTER}",
        "stderr": "err",
    }
    call = agent.calls[-1]
    assert isinstance(call, wire.ExecMachine)
    assert (call.argv, call.timeout_s, call.container) == (argv, 5.0, "side")
    assert base64.b64decode(call.stdin_base64) == b"in"


async def test_exec_answers_bytes_to_who_takes_those(web: TestPlatform) -> None:
    """machines-openapi.yaml: application/octet-stream beside JSON, raw output of the command."""
    machine, agent = await machine_of(web)
    written = bytes(range(256))
    agent.executed = wire.ExecResult(
        exit_code=0, signal=0, stdout_base64=base64.b64encode(written).decode(), stderr_base64="ZXJy"
    )
    bytes_only = web.auth | {"accept": "application/octet-stream"}
    answer = await web.http.post(f"{machine}/exec", json={"cmd": "cat x"}, headers=bytes_only)
    assert (answer.status_code, answer.content) == (200, written)
    assert answer.headers["content-type"] == "application/octet-stream"
    for accept in ("*/*", "application/json, application/octet-stream"):
        told = await web.http.post(f"{machine}/exec", json={"cmd": "cat x"}, headers=web.auth | {"accept": accept})
        assert told.json()["stderr"] == "err"
    agent.executed = wire.ExecResult(exit_code=0, signal=0, stdout_base64="", stderr_base64="", truncated=True)
    cut = await web.http.post(f"{machine}/exec", json={"cmd": "cat x"}, headers=bytes_only)
    assert cut.status_code == 400
    assert "longer than is kept" in cut.json()["error"]


@pytest.mark.parametrize(
    ("body", "where"),
    [({"machine": True}, ("", True)), ({"container": "side"}, ("side", False)), ({}, ("", False))],
    ids=["machine", "container", "neither"],
)
async def test_exec_says_where(web: TestPlatform, body: dict[str, Any], where: tuple[str, bool]) -> None:
    machine, agent = await machine_of(web)
    answer = await web.http.post(f"{machine}/exec", json={"cmd": "ls"} | body, headers=web.auth)
    assert answer.status_code == 200
    call = agent.calls[-1]
    assert isinstance(call, wire.ExecMachine)
    assert (call.container, call.machine) == where


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "command"),
        ({"command": []}, "command"),
        ({"cmd": "echo 'open"}, "cmd"),
        ({"cmd": "ls", "command": ["ls"]}, "command"),
        ({"cmd": "ls", "timeout": 61}, "timeout"),
        ({"cmd": "ls", "timeout": -1}, "timeout"),
        ({"cmd": "ls", "container": "a", "machine": True}, "machine"),
        ({"command": "ls"}, "command"),
    ],
    ids=["nothing", "empty", "quote", "both", "long", "negative", "where", "type"],
)
async def test_exec_refuses_by_field(web: TestPlatform, body: dict[str, Any], field: str) -> None:
    machine, agent = await machine_of(web)
    answer = await web.http.post(f"{machine}/exec", json=body, headers=web.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, field), answer.text
    assert not any(isinstance(call, wire.ExecMachine) for call in agent.calls)


async def test_exec_needs_a_running_machine_and_the_right_to_change_it(web: TestPlatform) -> None:
    machine, _ = await machine_of(web)
    await web.http.post(f"{machine}/stop", headers=web.auth)
    answer = await web.http.post(f"{machine}/exec", json={"cmd": "ls"}, headers=web.auth)
    assert (answer.status_code, answer.json()["status"]) == (412, "wrong_state")


# -- signal, suspend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "number"),
    [("SIGHUP", 1), ("hup", 1), (9, 9), ("9", 9), ("SIGUSR2", 12), ("SIGTRAP", 5)],
    ids=str,
)
async def test_signals_are_names_or_numbers(web: TestPlatform, signal: str | int, number: int) -> None:
    machine, agent = await machine_of(web)
    answer = await web.http.post(f"{machine}/signal", json={"signal": signal}, headers=web.auth)
    assert answer.status_code == 200
    assert agent.machines[machine.rpartition("/")[2]].signals == [number]


@pytest.mark.parametrize("signal", ["SIGSTOP", 19, 0, "", "SIGWINCH", -9], ids=str)
async def test_other_signals_are_refused(web: TestPlatform, signal: str | int) -> None:
    machine, agent = await machine_of(web)
    answer = await web.http.post(f"{machine}/signal", json={"signal": signal}, headers=web.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "signal")
    assert agent.machines[machine.rpartition("/")[2]].signals == []


async def test_suspend_then_start(web: TestPlatform) -> None:
    machine, _ = await machine_of(web)
    assert (await web.http.post(f"{machine}/suspend", headers=web.auth)).status_code == 200
    assert (await web.http.get(f"{machine}/wait?state=suspended&timeout=1", headers=web.auth)).json()["ok"] is True
    again = await web.http.post(f"{machine}/suspend", headers=web.auth)
    assert (again.status_code, again.json()["status"]) == (412, "wrong_state")
    started = await web.http.post(f"{machine}/start", headers=web.auth)
    assert started.json()["previous_state"] == "suspended"


# -- ps, versions, memory --------------------------------------------------------------------------------------------


async def test_ps_sorts_both_ways(web: TestPlatform) -> None:
    machine, _ = await machine_of(web)
    pids = [
        [process["pid"] for process in (await web.http.get(f"{machine}/ps?{query}", headers=web.auth)).json()]
        for query in ("sort_by=rss&order=desc", "sort_by=rss&order=asc", "")
    ]
    assert pids == [[2, 1], [1, 2], [1, 2]]
    for query in ("sort_by=listen_sockets", "order=up"):
        bad = await web.http.get(f"{machine}/ps?{query}", headers=web.auth)
        assert (bad.status_code, bad.json()["error"].partition(":")[0]) == (400, query.partition("=")[0])


async def test_versions_are_newest_first_with_what_was_asked_for(web: TestPlatform) -> None:
    machine, _ = await machine_of(web)
    first = (await web.http.get(machine, headers=web.auth)).json()["instance_id"]
    body = {"config": {"image": "registry.pantala.test/web:v2", "env": {"A": "2"}}}
    second = (await web.http.post(machine, json=body, headers=web.auth)).json()["instance_id"]
    found = (await web.http.get(f"{machine}/versions", headers=web.auth)).json()
    assert [version["version"] for version in found] == [second, first]
    assert found[0]["user_config"]["env"] == {"A": "2"}


async def test_memory_is_told_limited_and_taken_back(web: TestPlatform) -> None:
    """Shapes: flyctl-protocol reference, 4.13."""
    made = await web.create_machine("web", config={"image": "registry.pantala.test/web:v1", "size": "shared-cpu-2x"})
    machine = f"{MACHINES}/{made['id']}"
    told = await web.http.get(f"{machine}/memory", headers=web.auth)
    assert told.json() == {"available_mb": 512, "limit_mb": 512}
    changed = await web.http.put(f"{machine}/memory", json={"limit_mb": 300}, headers=web.auth)
    assert (changed.status_code, changed.json()) == (200, {"available_mb": 300, "limit_mb": 300})
    assert (await web.http.get(f"{machine}/memory", headers=web.auth)).json()["limit_mb"] == 300
    given = await web.http.post(f"{machine}/memory/reclaim", json={"amount_mb": 64}, headers=web.auth)
    assert (given.status_code, given.json()) == (200, {"actual_mb": 7})
    now = (await web.http.get(machine, headers=web.auth)).json()
    assert now["instance_id"] == made["instance_id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PUT", "memory", {"limit_mb": 513}, "limit_mb"),
        ("PUT", "memory", {"limit_mb": 0}, "limit_mb"),
        ("PUT", "memory", {"limit_mb": "256"}, "limit_mb"),
        ("POST", "memory/reclaim", {"amount_mb": 0}, "amount_mb"),
    ],
    ids=["above its size", "none", "type", "nothing"],
)
async def test_memory_is_refused_by_field(
    web: TestPlatform, method: str, path: str, body: dict[str, Any], field: str
) -> None:
    made = await web.create_machine("web", config={"image": "registry.pantala.test/web:v1", "size": "shared-cpu-2x"})
    answer = await web.http.request(method, f"{MACHINES}/{made['id']}/{path}", json=body, headers=web.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, field), answer.text


async def test_memory_of_a_stopped_machine_and_of_a_silent_host(web: TestPlatform) -> None:
    machine, agent = await machine_of(web)
    await web.http.post(f"{machine}/stop", headers=web.auth)
    answer = await web.http.put(f"{machine}/memory", json={"limit_mb": 128}, headers=web.auth)
    assert (answer.status_code, answer.json()["status"]) == (412, "wrong_state")
    agent.fail_next[wire.GetMemory] = NodeUnreachable("it does not answer")
    told = await web.http.get(f"{machine}/memory", headers=web.auth)
    assert told.json() == {"available_mb": 256, "limit_mb": 256}


# -- metadata of several keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_metadata_of_several_keys_at_once(web: TestPlatform, method: str) -> None:
    config = {"image": "registry.pantala.test/web:v1", "metadata": {"a": "1", "b": "2", "c": "3"}}
    made = await web.create_machine("web", config=config)
    metadata = f"{MACHINES}/{made['id']}/metadata"
    body = {"metadata": {"a": "9", "b": None, "c": "", "d": "4"}, "machine_version": made["version"]}
    answer = await web.http.request(method, metadata, json=body, headers=web.auth)
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await web.http.get(metadata, headers=web.auth)).json() == {"a": "9", "d": "4"}
    now = (await web.http.get(metadata.removesuffix("/metadata"), headers=web.auth)).json()
    assert now["instance_id"] == made["instance_id"]


async def test_a_stale_machine_version_is_412_and_changes_nothing(web: TestPlatform) -> None:
    made = await web.create_machine("web")
    machine = f"{MACHINES}/{made['id']}"
    body = {"config": {"image": "registry.pantala.test/web:v2"}}
    assert (await web.http.post(machine, json=body, headers=web.auth)).status_code == 200
    stale = {"metadata": {"a": "1"}, "machine_version": made["version"]}
    answer = await web.http.patch(f"{machine}/metadata", json=stale, headers=web.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (412, "machine_version")
    assert (await web.http.get(f"{machine}/metadata", headers=web.auth)).json() == {}


# -- leases, summaries -------------------------------------------------------------------------------------------------


async def test_leases_are_shown_to_those_who_ask_and_never_their_nonce(web: TestPlatform) -> None:
    machine, _ = await machine_of(web)
    lease = await web.http.post(f"{machine}/lease", json={"ttl": 30, "description": "a deploy"}, headers=web.auth)
    held = lease.json()
    assert lease.status_code == 201
    assert held["status"] == "success"
    assert {key: held[key] for key in held["data"]} == held["data"]
    expected = {key: held["data"][key] for key in ("description", "expires_at", "owner")}
    one = await web.http.get(f"{machine}?include_leases=true", headers=web.auth)
    listed = await web.http.get(f"{MACHINES}?include_leases=true", headers=web.auth)
    assert [one.json()["lease"], listed.json()[0]["lease"]] == [expected, expected]
    for answer in (await web.http.get(machine, headers=web.auth), await web.http.get(MACHINES, headers=web.auth)):
        assert '"lease"' not in answer.text
        assert held["data"]["nonce"] not in answer.text
    nonce = web.auth | {"fly-machine-lease-nonce": held["data"]["nonce"]}
    assert (await web.http.delete(f"{machine}/lease", headers=nonce)).status_code == 200
    gone = await web.http.delete(f"{machine}/lease", headers=nonce)
    assert (gone.status_code, gone.json()["error"]) == (404, "lease not found")


async def test_a_summary_leaves_out_what_is_long(web: TestPlatform) -> None:
    await machine_of(web)
    (summary,) = (await web.http.get(f"{MACHINES}?summary=true", headers=web.auth)).json()
    assert not {"config", "checks", "events", "host_status", "nonce"} & summary.keys()
    assert {"id", "name", "state", "region", "instance_id", "created_at", "updated_at"} <= summary.keys()


async def test_states_are_one_list_or_repeated(web: TestPlatform) -> None:
    machine, _ = await machine_of(web)
    for query in ("state=stopped,started", "state=stopped&state=started"):
        assert len((await web.http.get(f"{MACHINES}?{query}", headers=web.auth)).json()) == 1
        waited = await web.http.get(f"{machine}/wait?{query}&timeout=1s", headers=web.auth)
        assert (waited.status_code, waited.json()["state"]) == (200, "started")
    assert (await web.http.get(f"{MACHINES}?state=stopped", headers=web.auth)).json() == []
