"""Secrets are written and never read back; `Idempotency-Key`; rate limits."""

from __future__ import annotations

from pathlib import Path

import anyio
import httpx2
import pytest
from golden import check

from pantala.testing.platform import TestPlatform, running, serve_http
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

VALUE = "correct-horse-battery-staple"
SECRETS = "/v1/apps/web/secrets"


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


async def set_secret(web: TestPlatform, **values: str | None) -> httpx2.Response:
    return await web.http.post(SECRETS, json={"values": values}, headers=web.auth)


async def test_set_list_unset(web: TestPlatform) -> None:
    check("secrets_set", await set_secret(web, A=VALUE, B="2"))
    listed = await web.http.get(SECRETS, headers=web.auth)
    assert VALUE not in listed.text
    assert [secret["name"] for secret in listed.json()["secrets"]] == ["A", "B"]
    removed = await set_secret(web, A=None)
    assert ([secret["name"] for secret in removed.json()["secrets"]], removed.json()["version"]) == (["B"], 2)
    assert (await set_secret(web, UNKNOWN=None)).json()["version"] == 3
    one = await web.http.post(f"{SECRETS}/C", json={"value": "3"}, headers=web.auth)
    assert (one.status_code, one.json()["version"]) == (201, 4)
    assert (await web.http.delete(f"{SECRETS}/C", headers=web.auth)).json()["version"] == 5
    assert (await web.http.delete(f"{SECRETS}/C", headers=web.auth)).status_code == 404


async def test_a_digest_tells_equal_values_apart_from_others_but_is_not_a_plain_hash(web: TestPlatform) -> None:
    listed = (await set_secret(web, A="1", B="1", C="2")).json()["secrets"]
    digests = {secret["name"]: secret["digest"] for secret in listed}
    assert digests["A"] == digests["B"] != digests["C"]
    import hashlib

    assert digests["A"] not in hashlib.sha256(b"1").hexdigest()


async def test_machines_get_secrets_at_creation_and_nodes_get_newer_ones(web: TestPlatform) -> None:
    await set_secret(web, A=VALUE)
    agent = web.agents["node-1"]
    await web.create_machine("web")
    assert agent.secrets_of("web") == {"A": VALUE}
    await set_secret(web, B="2")
    assert agent.secrets_of("web") == {"A": VALUE, "B": "2"}
    assert isinstance(agent.calls[-1], wire.PutSecrets)


async def test_a_node_that_was_away_gets_them_from_the_sweep(web: TestPlatform) -> None:
    await web.create_machine("web")
    agent = web.agents["node-1"]
    agent.silent = True
    assert (await set_secret(web, A=VALUE)).status_code == 200
    agent.silent = False
    await web.control.sweep.cycle()
    assert agent.secrets_of("web") == {"A": VALUE}
    calls = len(agent.calls)
    await web.control.sweep.cycle()
    assert len(agent.calls) == calls


async def test_a_reused_app_name_does_not_fall_behind_in_versions(web: TestPlatform) -> None:
    await set_secret(web, OLD="x")
    await web.create_machine("web")
    await web.http.delete("/v1/apps/web", headers=web.auth)
    await web.create_app("web")
    assert (await web.http.get(SECRETS, headers=web.auth)).json()["secrets"] == []
    await set_secret(web, NEW="y")
    await web.create_machine("web")
    assert web.agents["node-1"].secrets_of("web") == {"NEW": "y"}


@pytest.mark.parametrize("name", ["1A", "A-B", "A B", "", "A" * 300])
async def test_names_that_no_environment_can_hold_are_refused(web: TestPlatform, name: str) -> None:
    answer = await set_secret(web, **{name: VALUE})
    assert answer.status_code == 400
    assert VALUE not in answer.text


async def test_bad_values_are_refused_without_repeating_them(web: TestPlatform) -> None:
    for value in ("x" * 65_537, "nul\0nul"):
        answer = await set_secret(web, A=value)
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("values.A: ")
        assert value not in answer.text
    assert (await web.http.get(SECRETS, headers=web.auth)).json()["version"] == 0


async def test_no_secret_token_or_body_is_in_the_database_or_on_the_bus(tmp_path: Path) -> None:
    async with running(tmp_path) as web:
        await web.create_app("web")
        headers = web.auth | {"idempotency-key": "k1"}
        await web.http.post(SECRETS, json={"values": {"A": VALUE}}, headers=headers)
        made = await web.http.post("/v1/tokens", json={"name": "ci"}, headers=web.auth | {"idempotency-key": "k2"})
        await web.create_machine("web")
        tokens = [web.token, made.json()["token"]]
        payloads = b"".join(repr(call).encode() for call in web.agents["node-1"].calls)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.name == "control.db" for path in files)
    for needle in (VALUE, *tokens):
        assert needle.encode() not in payloads
        assert [str(path) for path, content in files.items() if needle.encode() in content] == []


# -- idempotency -------------------------------------------------------------------------------------------------


async def test_the_same_key_and_body_get_the_same_answer_once_done(web: TestPlatform) -> None:
    body = {"config": {"image": "registry.pantala.test/web:v1"}}
    headers = web.auth | {"idempotency-key": "create-1"}
    first = await web.http.post("/v1/apps/web/machines", json=body, headers=headers)
    second = await web.http.post("/v1/apps/web/machines", json=body, headers=headers)
    assert (first.status_code, first.json()) == (second.status_code, second.json())
    assert len(web.agents["node-1"].machines) == 1


async def test_the_same_key_with_another_body_is_refused(web: TestPlatform) -> None:
    headers = web.auth | {"idempotency-key": "k"}
    await web.http.post(SECRETS, json={"values": {"A": "1"}}, headers=headers)
    answer = await web.http.post(SECRETS, json={"values": {"A": "2"}}, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("Idempotency-Key: ")
    assert (await web.http.get(SECRETS, headers=web.auth)).json()["version"] == 1


async def test_keys_belong_to_who_sent_them_and_refusals_are_kept_too(web: TestPlatform) -> None:
    others = await web.admin("eve@example.com", "evil")
    for headers, code in ((web.auth, 201), (others, 404), (others, 404)):
        body = {"app_name": "fresh", "org_slug": "acme"}
        answer = await web.http.post("/v1/apps", json=body, headers=headers | {"idempotency-key": "k"})
        assert answer.status_code == code


async def test_a_failure_of_ours_is_not_kept(web: TestPlatform) -> None:
    made = await web.create_machine("web")
    agent = web.agents["node-1"]
    agent.silent = True
    stop, headers = f"/v1/apps/web/machines/{made['id']}/stop", web.auth | {"idempotency-key": "k"}
    assert (await web.http.post(stop, headers=headers)).status_code == 500
    agent.silent = False
    assert (await web.http.post(stop, headers=headers)).status_code == 200


async def test_a_request_that_is_still_carried_out_is_not_carried_out_twice(web: TestPlatform) -> None:
    begun = await web.control.idempotency.begin(scope="me", key="k", request=b"x")
    assert begun is None
    from pantala.errors import Conflict

    with pytest.raises(Conflict):
        await web.control.idempotency.begin(scope="me", key="k", request=b"x")
    web.control.context.boot = "another life"
    assert await web.control.idempotency.begin(scope="me", key="k", request=b"x") is None


# -- limits ------------------------------------------------------------------------------------------------------


async def test_too_many_requests_are_429_with_a_time_to_come_back(web: TestPlatform) -> None:
    async with serve_http(web, per_s=0.5, burst=2) as url, httpx2.AsyncClient(base_url=url, headers=web.auth) as http:
        answers = [await http.get("/v1/user") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[-1].json()["status"] == "rate_limited"
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert (await http.get("/v1/orgs")).status_code == 200
    await anyio.lowlevel.checkpoint()
