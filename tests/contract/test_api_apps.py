"""Apps, accounts and tokens against the reference: codes, bodies, names that are taken, other people's things."""

from __future__ import annotations

import anyio
import pytest
from golden import check

from pantala.testing.platform import TestPlatform

pytestmark = pytest.mark.anyio


async def test_creating_an_app(platform: TestPlatform) -> None:
    body = {"app_name": "web", "org_slug": "acme"}
    answer = await platform.http.post("/v1/apps?wait=true", json=body, headers=platform.auth)
    check("app_create", answer)
    check("app_get", await platform.http.get("/v1/apps/web", headers=platform.auth))
    check("app_list", await platform.http.get("/v1/apps?org_slug=acme", headers=platform.auth))
    assert platform.rows.rows["app/web"] == {"app": "web", "org": "acme", "network": 1}
    assert platform.rows.rows["host/web.apps.pantala.test"] == {"app": "web"}
    assert answer.headers["fly-request-id"]


async def test_flyctl_sends_name_and_an_empty_network(platform: TestPlatform) -> None:
    body = {"name": "web", "org_slug": "acme", "network": "", "app_role_id": ""}
    answer = await platform.http.post("/v1/apps", json=body, headers=platform.auth)
    assert (answer.status_code, answer.json()["network"]) == (201, "default")


@pytest.mark.parametrize("name", ["web", "api", "registry", "www"], ids=["taken", "api", "registry", "www"])
async def test_a_taken_or_reserved_name_is_422_name_taken(platform: TestPlatform, name: str) -> None:
    await platform.create_app("web")
    others = await platform.admin("eve@example.com", "evil")
    answer = await platform.http.post("/v1/apps", json={"app_name": name, "org_slug": "evil"}, headers=others)
    assert answer.status_code == 422
    assert answer.json()["status"] == "name_taken"
    assert "already been taken" in answer.json()["error"]
    assert (await platform.http.get("/v1/apps?org_slug=evil", headers=others)).json()["total_apps"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"org_slug": "acme"}, "app_name"),
        ({"app_name": "Web", "org_slug": "acme"}, "app_name"),
        ({"app_name": "a" * 64, "org_slug": "acme"}, "app_name"),
        ({"app_name": "-web", "org_slug": "acme"}, "app_name"),
        ({"app_name": 3, "org_slug": "acme"}, "app_name"),
        ({"app_name": "web"}, "body"),
        ({"app_name": "web", "org_slug": "acme", "network": "9 lives"}, "network"),
    ],
    ids=["missing", "upper", "long", "dash", "number", "no-org", "network"],
)
async def test_bad_requests_name_the_field_and_change_nothing(
    platform: TestPlatform, body: dict[str, object], field: str
) -> None:
    answer = await platform.http.post("/v1/apps", json=body, headers=platform.auth)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{field}: ")
    assert answer.json()["status"] == "invalid_request"
    assert (await platform.http.get("/v1/apps?org_slug=acme", headers=platform.auth)).json()["apps"] == []


async def test_others_apps_are_403_by_name_and_404_otherwise(platform: TestPlatform) -> None:
    await platform.create_app("web")
    machine = await platform.create_machine("web")
    others = await platform.admin("eve@example.com", "evil")
    assert (await platform.http.get("/v1/apps/web", headers=others)).status_code == 403
    assert (await platform.http.get("/v1/apps/free", headers=others)).status_code == 404
    for method, path in (
        ("DELETE", "/v1/apps/web"),
        ("GET", "/v1/apps/web/machines"),
        ("GET", f"/v1/apps/web/machines/{machine['id']}"),
        ("POST", f"/v1/apps/web/machines/{machine['id']}/stop"),
        ("DELETE", f"/v1/apps/web/machines/{machine['id']}?force=true"),
        ("GET", "/v1/apps/web/secrets"),
        ("GET", "/v1/apps/web/logs"),
        ("GET", "/v1/apps/web/releases"),
        ("GET", "/v1/apps?org_slug=acme"),
    ):
        answer = await platform.http.request(method, path, headers=others)
        assert answer.status_code == 404, (method, path, answer.text)
        assert answer.json()["status"] == "not_found"
    assert platform.agents["node-1"].machines[machine["id"]].state == "started"


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "FlyV1 fm2_x"}, {"authorization": "Digest x"}],
    ids=["none", "wrong", "macaroon", "scheme"],
)
async def test_without_a_valid_token_everything_is_401(platform: TestPlatform, headers: dict[str, str]) -> None:
    answer = await platform.http.get("/v1/apps", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["status"] == "unauthenticated"


async def test_one_valid_token_of_several_suffices(platform: TestPlatform) -> None:
    headers = {"authorization": f"FlyV1 fm2_x,{platform.token}"}
    check("user", await platform.http.get("/v1/user", headers=headers))


async def test_a_deleted_app_frees_its_name_and_its_machines_are_swept(platform: TestPlatform) -> None:
    await platform.create_app("web")
    machine = await platform.create_machine("web")
    assert (await platform.http.delete("/v1/apps/web?force=true", headers=platform.auth)).status_code == 202
    assert (await platform.http.get("/v1/apps/web", headers=platform.auth)).status_code == 404
    assert not any("web" in key for key in platform.rows.rows)
    await platform.create_app("web")
    await platform.control.sweep.cycle()
    assert platform.agents["node-1"].machines[machine["id"]].state == "destroyed"
    assert (await platform.http.get("/v1/apps/web/machines", headers=platform.auth)).json() == []


async def test_a_network_keeps_its_id_and_each_network_has_another(platform: TestPlatform) -> None:
    await platform.create_app("one")
    body = {"app_name": "two", "org_slug": "acme", "network": "private"}
    await platform.http.post("/v1/apps", json=body, headers=platform.auth)
    await platform.http.delete("/v1/apps/one", headers=platform.auth)
    await platform.create_app("three")
    networks = {name: platform.rows.rows[f"app/{name}"]["network"] for name in ("two", "three")}
    assert networks == {"two": 2, "three": 1}


async def test_a_deploy_token_deploys_its_app_and_nothing_else(platform: TestPlatform) -> None:
    await platform.create_app("web")
    await platform.create_app("other")
    body = {"name": "ci", "app": "web", "expiry": "1h"}
    made = await platform.http.post("/v1/tokens", json=body, headers=platform.auth)
    check("token_create", made)
    ci = {"authorization": f"Bearer {made.json()['token']}"}
    machine = {"config": {"image": "registry.pantala.test/web:v1"}}
    assert (await platform.http.post("/v1/apps/web/machines", json=machine, headers=ci)).status_code == 200
    assert (await platform.http.get("/v1/apps/other/machines", headers=ci)).status_code == 404
    assert (await platform.http.delete("/v1/apps/web", headers=ci)).status_code == 403
    assert (await platform.http.post("/v1/tokens", json=body, headers=ci)).status_code == 403
    assert (await platform.http.post("/v1/tokens", json={"name": "x"}, headers=ci)).status_code == 403
    listed = await platform.http.get("/v1/apps?org_slug=acme", headers=ci)
    assert [app["name"] for app in listed.json()["apps"]] == ["web"]


async def test_an_expired_token_is_401(platform: TestPlatform) -> None:
    answer = await platform.http.post("/v1/tokens", json={"name": "x", "expiry": "1ms"}, headers=platform.auth)
    await anyio.sleep(0.01)
    headers = {"authorization": f"Bearer {answer.json()['token']}"}
    assert (await platform.http.get("/v1/user", headers=headers)).status_code == 401


@pytest.mark.parametrize("expiry", ["soon", "0", "200000h"])
async def test_a_bad_expiry_is_refused(platform: TestPlatform, expiry: str) -> None:
    answer = await platform.http.post("/v1/tokens", json={"name": "x", "expiry": expiry}, headers=platform.auth)
    assert (answer.status_code, answer.json()["error"][:8]) == (400, "expiry: ")


async def test_regions(platform: TestPlatform) -> None:
    check("regions", await platform.http.get("/v1/platform/regions", headers=platform.auth))


async def test_unknown_paths_and_methods_answer_in_the_api_s_own_words(platform: TestPlatform) -> None:
    missing = await platform.http.get("/v1/nothing", headers=platform.auth)
    assert (missing.status_code, missing.json()["status"]) == (404, "not_found")
    wrong = await platform.http.delete("/v1/user", headers=platform.auth)
    assert (wrong.status_code, wrong.json()["status"]) == (405, "method_not_allowed")
    assert missing.headers["fly-request-id"] != wrong.headers["fly-request-id"]
    assert (await platform.http.get("/healthz")).json() == {"ok": True}
    assert (await platform.http.get("/openapi.json")).json()["openapi"] == "3.1.0"
