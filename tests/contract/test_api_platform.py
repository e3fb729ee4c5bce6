"""Placements, machines of an org, tokens, what comes later: flyctl-protocol reference 4.11 and 4.13."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from pantala.server.routes.later import ENDPOINTS
from pantala.testing.platform import TestPlatform, running, serve_http

pytestmark = pytest.mark.anyio

PLACEMENTS = "/v1/platform/placements"


async def place(platform: TestPlatform, **body: Any) -> httpx2.Response:
    body = {"org_slug": "acme", "compute": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 1024}} | body
    return await platform.http.post(PLACEMENTS, json=body, headers=platform.auth)


# -- placements ---------------------------------------------------------------------------------------------------


async def test_placements_in_both_spellings_reserve_nothing(platform: TestPlatform) -> None:
    await platform.add_agent("node-2", region="lhr")
    for _ in range(2):
        answer = await place(platform, region="lhr,any", count=10)
        assert answer.status_code == 200
        assert [(row["region"], row["count"], row["concurrency"]) for row in answer.json()["regions"]] == [
            ("lhr", 8, 1),
            ("iad", 2, 1),
        ]
        assert answer.json()["Regions"][0]["Region"] == "lhr"
        assert [row["Count"] for row in answer.json()["Regions"]] == [8, 2]


async def test_count_0_tells_the_room_of_each_region(platform: TestPlatform) -> None:
    await platform.add_agent("node-2", region="lhr", memory_mib=4096)
    answer = await place(platform, region="any")
    assert [(row["region"], row["count"]) for row in answer.json()["regions"]] == [("iad", 8), ("lhr", 4)]


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ({"count": 9}, 422, "insufficient_capacity"),
        ({"region": "xyz"}, 400, "region: "),
        ({"count": -1}, 400, "count: "),
        ({"weights": {"price": 1}}, 400, "weights: "),
        ({"compute": {"cpus": 3}}, 400, "config.guest.cpus: "),
        ({"org_slug": "other"}, 404, "organization not found"),
        ({"volume_name": "data"}, 501, "volume_name: "),
    ],
    ids=["full", "region", "count", "weights", "cpus", "org", "volume"],
)
async def test_placements_that_cannot_be(platform: TestPlatform, body: dict[str, Any], code: int, told: str) -> None:
    answer = await place(platform, **body)
    assert answer.status_code == code
    assert told in (answer.json()["status"] + " " + answer.json()["error"])


async def test_regions_in_both_spellings(platform: TestPlatform) -> None:
    answer = (await platform.http.get("/v1/platform/regions", headers=platform.auth)).json()
    assert answer["regions"] == answer["Regions"]
    assert answer["nearest"] == answer["Nearest"] == "iad"


async def test_regions_are_offered_for_what_they_have_here(platform: TestPlatform) -> None:
    """Clients leave deprecated regions out, and offer managed Postgres where it is said to be."""
    await platform.add_agent("node-2", region="mad")
    regions = (await platform.http.get("/v1/platform/regions", headers=platform.auth)).json()["Regions"]
    assert {region["code"]: region["deprecated"] for region in regions} == {"iad": False, "lhr": False, "mad": False}
    clusters = await platform.http.get("/v1/postgres", headers=platform.auth)
    assert (clusters.status_code, {region["mpg_available"] for region in regions}) == (501, {False})


# -- machines of an org -------------------------------------------------------------------------------------------


async def listed(platform: TestPlatform, query: str = "", **headers: str) -> dict[str, Any]:
    answer = await platform.http.get(f"/v1/orgs/acme/machines{query}", headers=platform.auth | headers)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def test_machines_of_all_apps_in_pages(platform: TestPlatform) -> None:
    for app in ("one", "two"):
        await platform.create_app(app)
    made = [await platform.create_machine(app) for app in ("one", "two", "one")]
    seen: list[dict[str, Any]] = []
    cursor = ""
    for _ in range(2):
        page = await listed(platform, f"?limit=2&cursor={cursor}")
        seen += page["machines"]
        cursor = page.get("next_cursor", "")
        assert page["last_machine_id"] == seen[-1]["id"]
        assert page["last_updated_at"] == seen[-1]["updated_at"]
        assert page["error_regions"] == []
    assert cursor == ""
    assert sorted(machine["id"] for machine in seen) == sorted(machine["id"] for machine in made)
    assert [machine["updated_at"] for machine in seen] == sorted(machine["updated_at"] for machine in seen)
    assert {machine["app_name"] for machine in seen} == {"one", "two"}
    assert seen[0]["config"]["image"] == "registry.pantala.test/one:v1"


async def test_filters_of_an_orgs_machines(platform: TestPlatform) -> None:
    await platform.create_app("web")
    await platform.add_agent("node-2", region="lhr")
    here = await platform.create_machine("web", region="iad")
    there = await platform.create_machine("web", region="lhr")
    await platform.http.post(f"/v1/apps/web/machines/{there['id']}/stop", headers=platform.auth)
    for query, expected in (
        ("?region=lhr", [there["id"]]),
        ("?state=started", [here["id"]]),
        ("?state=started,stopped&region=iad", [here["id"]]),
        ("?updated_after=2999-01-01T00:00:00Z", []),
    ):
        assert [machine["id"] for machine in (await listed(platform, query))["machines"]] == expected, query
    assert "config" not in (await listed(platform, "?summary=true"))["machines"][0]
    await platform.http.delete(f"/v1/apps/web/machines/{here['id']}?force=true", headers=platform.auth)
    assert len((await listed(platform))["machines"]) == 1
    assert {machine["state"] for machine in (await listed(platform, "?include_deleted=true"))["machines"]} == {
        "stopped",
        "destroyed",
    }


async def test_hosts_that_do_not_answer_are_told_by_region(platform: TestPlatform) -> None:
    await platform.create_app("web")
    await platform.create_machine("web")
    platform.agents["node-1"].silent = True
    found = await listed(platform)
    assert found["error_regions"] == ["iad"]
    assert len(found["machines"]) == 1


async def test_others_see_nothing_of_it(platform: TestPlatform) -> None:
    await platform.create_app("web")
    await platform.create_app("other")
    await platform.create_machine("web")
    eve = await platform.admin("eve@example.com", "evil")
    assert (await platform.http.get("/v1/orgs/acme/machines", headers=eve)).status_code == 404
    token = await platform.http.post("/v1/apps/other/deploy_token", json={}, headers=platform.auth)
    assert (await listed(platform, authorization=f"Bearer {token.json()['token']}"))["machines"] == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "cursor=nonsense", "updated_after=yesterday", "summary=maybe"]
)
async def test_bad_queries_name_the_parameter(platform: TestPlatform, query: str) -> None:
    answer = await platform.http.get(f"/v1/orgs/acme/machines?{query}", headers=platform.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, query.partition("=")[0])


# -- tokens -------------------------------------------------------------------------------------------------------


async def test_what_a_token_is(platform: TestPlatform) -> None:
    await platform.create_app("web")
    made = await platform.http.post("/v1/apps/web/deploy_token", json={}, headers=platform.auth)
    header = f"Bearer {made.json()['token']}"
    current = await platform.http.get("/v1/tokens/current", headers={"authorization": header})
    (token,) = current.json()["tokens"]
    assert (token["org_slug"], token["apps"], token["user"]) == ("acme", ["web"], "ada@example.com")
    (own,) = (await platform.http.get("/v1/tokens/current", headers=platform.auth)).json()["tokens"]
    assert (own["org_slug"], own["apps"]) == ("acme", [])
    known = await platform.http.post("/v1/tokens/authenticate", json={"header": header}, headers=platform.auth)
    assert (known.status_code, known.json()["user"]) == (200, "ada@example.com")
    wrong = await platform.http.post("/v1/tokens/authenticate", json={"header": "Bearer x"}, headers=platform.auth)
    assert wrong.status_code == 401


@pytest.mark.parametrize(
    ("access", "code"),
    [
        ({"app_name": "web", "action": "rw"}, 200),
        ({"app_name": "web", "action": 3}, 200),
        ({"app_name": "web", "machine_id": "1", "action": "cd", "command": ["ls"]}, 200),
        ({"app_name": "web", "action": "d"}, 403),
        ({"app_name": "other", "action": "r"}, 404),
        ({"org_slug": "acme", "action": "r"}, 403),
        ({"app_name": "web", "action": "x"}, 400),
        ({"app_name": "web", "action": 32}, 400),
        ({"action": "r"}, 400),
        ({"app_name": "web", "action": "r", "volume_id": "vol_1"}, 501),
    ],
    ids=["rw", "bits", "machine", "delete", "other", "org", "letter", "bit", "nothing", "volume"],
)
async def test_what_a_deploy_token_may(platform: TestPlatform, access: dict[str, Any], code: int) -> None:
    for app in ("web", "other"):
        await platform.create_app(app)
    made = await platform.http.post("/v1/apps/web/deploy_token", json={}, headers=platform.auth)
    body = {"header": f"Bearer {made.json()['token']}", "access": access}
    answer = await platform.http.post("/v1/tokens/authorize", json=body, headers=platform.auth)
    assert answer.status_code == code, answer.text


# -- later, limits ------------------------------------------------------------------------------------------------


async def test_what_comes_later_says_so(platform: TestPlatform) -> None:
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{", "").replace("}", "")
        answer = await platform.http.request(endpoint.method, path, json={}, headers=platform.auth)
        assert (answer.status_code, answer.json()["status"]) == (501, "not_implemented"), path
        assert "by this version" in answer.json()["error"]
        assert answer.headers["fly-request-id"]
        assert (await platform.http.request(endpoint.method, path)).status_code == 401


async def test_limits_count_an_action_on_one_machine(platform: TestPlatform) -> None:
    await platform.create_app("web")
    first, second = [(await platform.create_machine("web"))["id"] for _ in range(2)]
    async with (
        serve_http(platform, per_s=0.01, burst=3) as url,
        httpx2.AsyncClient(base_url=f"{url}/v1/apps/web/machines", headers=platform.auth) as http,
    ):
        codes = [(await http.post(f"/{first}/cordon")).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        assert (await http.post(f"/{first}/uncordon")).status_code == 200
        assert (await http.post(f"/{second}/cordon")).status_code == 200
        over = await http.post(f"/{first}/cordon")
        assert (over.json()["status"], int(over.headers["retry-after"]) >= 1) == ("rate_limited", True)


async def test_platforms_in_one_process_share_nothing_but_their_routes(platform: TestPlatform, tmp_path: Path) -> None:
    await platform.create_app("web")
    async with running(tmp_path / "other") as other:
        await other.create_app("shop")
        for mine, theirs, app in ((platform, other, "web"), (other, platform, "shop")):
            listed = await mine.http.get("/v1/apps?org_slug=acme", headers=mine.auth)
            assert [found["name"] for found in listed.json()["apps"]] == [app]
            assert (await mine.http.get("/v1/apps?org_slug=acme", headers=theirs.auth)).status_code == 401
