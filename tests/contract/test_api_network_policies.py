"""Network policies over the API, and the rows that hosts apply them by.

Shapes and sentences: machines reference, section 14. The list is a bare array, a missing name is 400.
"""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from pantala.testing.platform import TestPlatform

pytestmark = pytest.mark.anyio

EGRESS = {
    "name": "specific-egress",
    "selector": {"all": True},
    "rules": [
        {
            "action": "allow",
            "direction": "egress",
            "ports": [{"protocol": "tcp", "port": 80}, {"protocol": "tcp", "port": 443}],
        }
    ],
}
INGRESS = {"action": "allow", "direction": "ingress", "ports": [{"protocol": "udp", "port": 53}]}


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


async def put(platform: TestPlatform, body: Any, app: str = "web", **headers: str) -> httpx2.Response:
    return await platform.http.post(f"/v1/apps/{app}/network_policies", json=body, headers=headers or platform.auth)


async def listed(platform: TestPlatform, app: str = "web") -> list[dict[str, Any]]:
    answer = await platform.http.get(f"/v1/apps/{app}/network_policies", headers=platform.auth)
    assert answer.status_code == 200
    return answer.json()


def rows(platform: TestPlatform, policy_id: str, app: str = "web") -> list[dict[str, Any]]:
    prefix = f"policy/{app}/{policy_id}/"
    return [row for key, row in sorted(platform.rows.rows.items()) if key.startswith(prefix)]


async def test_a_policy_is_made_listed_read_and_removed(web: TestPlatform) -> None:
    assert await listed(web) == []
    made = await put(web, EGRESS)
    assert made.status_code == 200
    policy = made.json()
    assert {key: policy[key] for key in ("name", "selector", "rules")} == EGRESS
    assert await listed(web) == [policy]
    one = f"/v1/apps/web/network_policies/{policy['id']}"
    assert (await web.http.get(one, headers=web.auth)).json() == policy
    assert rows(web, policy["id"]) == [{"app": "web", "direction": "egress", "ports": ["tcp/443", "tcp/80"]}]

    assert (await web.http.delete(one, headers=web.auth)).status_code == 204
    assert await listed(web) == []
    assert rows(web, policy["id"]) == []
    for method in ("GET", "DELETE"):
        gone = await web.http.request(method, one, headers=web.auth)
        assert (gone.status_code, gone.json()["status"]) == (404, "not_found")


async def test_with_its_id_a_policy_is_changed_and_its_rows_follow(web: TestPlatform) -> None:
    policy = (await put(web, EGRESS)).json()
    machines = [{"id": f"{number:014x}"} for number in range(8)]
    changed = EGRESS | {"id": policy["id"], "name": "both", "selector": {"machines": machines}}
    changed |= {"rules": [*EGRESS["rules"], INGRESS]}
    answer = await put(web, changed)
    assert answer.status_code == 200
    assert {key: answer.json()[key] for key in changed} == changed
    assert answer.json()["created_at"] == policy["created_at"]
    assert [one["id"] for one in await listed(web)] == [policy["id"]]
    shown = rows(web, policy["id"])
    assert {(row["direction"], *row["ports"], len(row["machines"])) for row in shown} == {
        ("ingress", "udp/53", 6),
        ("ingress", "udp/53", 2),
        ("egress", "tcp/443", "tcp/80", 6),
        ("egress", "tcp/443", "tcp/80", 2),
    }
    metadata = {"role": "web", "env": "production"}
    await put(web, EGRESS | {"id": policy["id"], "selector": {"metadata": metadata}})
    assert rows(web, policy["id"]) == [
        {"app": "web", "direction": "egress", "ports": ["tcp/443", "tcp/80"], "metadata": metadata}
    ]


async def test_without_an_id_the_policy_of_that_name_is_meant(web: TestPlatform) -> None:
    first = (await put(web, EGRESS)).json()
    assert (await put(web, EGRESS)).json() == first
    other = (await put(web, EGRESS | {"rules": [INGRESS]})).json()
    assert (other["id"], other["rules"]) == (first["id"], [INGRESS])
    second = (await put(web, EGRESS | {"name": "second"})).json()
    assert [one["name"] for one in await listed(web)] == ["specific-egress", "second"]
    taken = await put(web, EGRESS | {"id": second["id"]})
    assert (taken.status_code, taken.json()["status"]) == (422, "name_taken")
    missing = await put(web, EGRESS | {"id": "01J00000000000000000000000"})
    assert missing.status_code == 404


async def test_all_rows_are_published_again_and_go_with_their_app(web: TestPlatform) -> None:
    policy = (await put(web, EGRESS)).json()
    before = rows(web, policy["id"])
    web.rows.rows.clear()
    await web.control.publication.publish_all()
    assert rows(web, policy["id"]) == before
    assert (await web.http.delete("/v1/apps/web", headers=web.auth)).status_code == 202
    assert rows(web, policy["id"]) == []
    await web.create_app("web")
    assert await listed(web) == []


PORT = {"protocol": "tcp", "port": 80}
RULE = {"action": "allow", "direction": "egress", "ports": [PORT]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "name"),
    "long name": ({"name": "n" * 65}, "name"),
    "nobody selected": ({"selector": {}}, "selector"),
    "all is false": ({"selector": {"all": False}}, "selector"),
    "apps": ({"selector": {"all": True, "apps": ["db"]}}, "selector"),
    "no machine id": ({"selector": {"machines": [{"id": ""}]}}, "selector.machines[0].id"),
    "many machines": ({"selector": {"machines": [{"id": f"{n:014x}"} for n in range(129)]}}, "selector.machines"),
    "long metadata": ({"selector": {"metadata": {"k": "v" * 128}}}, "selector.metadata"),
    "no rules": ({"rules": []}, "rules"),
    "deny": ({"rules": [RULE | {"action": "deny"}]}, "rules[0].action"),
    "sideways": ({"rules": [RULE, RULE | {"direction": "sideways"}]}, "rules[1].direction"),
    "no ports": ({"rules": [{"action": "allow", "direction": "egress"}]}, "rules[0]"),
    "a destination": ({"rules": [RULE | {"cidrs": ["192.0.2.0/24"]}]}, "rules[0]"),
    "icmp": ({"rules": [RULE | {"ports": [PORT, {"protocol": "icmp", "port": 1}]}]}, "rules[0].ports[1].protocol"),
    "port 0": ({"rules": [RULE | {"ports": [PORT | {"port": 0}]}]}, "rules[0].ports[0].port"),
    "port 65536": ({"rules": [RULE | {"ports": [PORT | {"port": 65_536}]}]}, "rules[0].ports[0].port"),
    "a range": ({"rules": [RULE | {"ports": [PORT | {"port": "80-90"}]}]}, "rules[0].ports[0].port"),
    "many ports": ({"rules": [RULE | {"ports": [PORT | {"port": n} for n in range(1, 258)]}]}, "rules"),
    "many rules": ({"rules": [RULE] * 65}, "rules"),
    "machines times ports": (
        {
            "selector": {"machines": [{"id": f"{n:014x}"} for n in range(60)]},
            "rules": [RULE | {"ports": [PORT | {"port": n} for n in range(1, 91)]}],
        },
        "rules",
    ),
}


@pytest.mark.parametrize(("change", "field"), WRONG.values(), ids=WRONG)
async def test_what_is_wrong_is_named_and_changes_nothing(
    web: TestPlatform, change: dict[str, Any], field: str
) -> None:
    answer = await put(web, EGRESS | change)
    assert (answer.status_code, answer.json()["error"].split(": ")[0]) == (400, field), answer.text
    assert await listed(web) == []


async def test_a_body_without_a_name_is_400(web: TestPlatform) -> None:
    answer = await put(web, {"selector": {"all": True}, "rules": [RULE]})
    assert answer.status_code == 400
    assert "`name`" in answer.json()["error"]


async def test_an_app_has_at_most_64(web: TestPlatform) -> None:
    for number in range(64):
        (await put(web, EGRESS | {"name": f"p{number}"})).raise_for_status()
    refused = await put(web, EGRESS)
    assert refused.status_code == 400
    assert "64 network policies" in refused.json()["error"]
    assert (await put(web, EGRESS | {"name": "p1", "rules": [INGRESS]})).status_code == 200


async def test_who_may(web: TestPlatform) -> None:
    policy = (await put(web, EGRESS)).json()
    paths = ("/v1/apps/web/network_policies", f"/v1/apps/web/network_policies/{policy['id']}")
    stranger = await web.admin("eve@example.com", "evil")
    assert (await put(web, EGRESS, **stranger)).status_code == 404
    for path in paths:
        assert (await web.http.get(path, headers=stranger)).status_code == 404
        assert (await web.http.get(path)).status_code == 401
    assert (await web.http.delete(paths[1], headers=stranger)).status_code == 404

    await web.create_app("other")
    assert (await web.http.get(f"/v1/apps/other/network_policies/{policy['id']}", headers=web.auth)).status_code == 404
    assert (await put(web, EGRESS | {"id": policy["id"]}, app="other")).status_code == 404

    for app, code in (("web", 200), ("other", 404)):
        made = await web.http.post("/v1/tokens", json={"name": app, "app": app}, headers=web.auth)
        token = {"authorization": f"Bearer {made.json()['token']}"}
        assert (await web.http.get(paths[0], headers=token)).status_code == code
        assert (await put(web, EGRESS, **token)).status_code == code
        assert (await web.http.delete(paths[1], headers=token)).status_code == (204 if code == 200 else 404)
