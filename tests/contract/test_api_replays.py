"""Whose replays reach an org's apps: who may say so, what the edges learn, and the commands for it."""

from __future__ import annotations

import json

import pytest
from commands import Cli

from pantala.testing.platform import TestPlatform

pytestmark = pytest.mark.anyio

PATH = "/v1/orgs/acme/replays"
NOBODY = {"cross_network": False, "sources": []}


async def test_an_org_lets_in_nobody_until_it_says_so(platform: TestPlatform) -> None:
    answer = await platform.http.get(PATH, headers=platform.auth)
    assert (answer.status_code, answer.json()) == (200, NOBODY)
    assert "org/acme" not in platform.rows.rows


async def test_what_is_allowed_reaches_the_edges_and_is_taken_back(platform: TestPlatform) -> None:
    await platform.admin("ada@example.com", "partner")
    body = {"cross_network": True, "add": ["partner"]}
    for _ in range(2):
        answer = await platform.http.post(PATH, json=body, headers=platform.auth)
        assert (answer.status_code, answer.json()) == (200, {"cross_network": True, "sources": ["partner"]})
    assert platform.rows.rows["org/acme"] == {"cross_network": True, "replay_from": ["partner"]}
    answer = await platform.http.post(PATH, json={"cross_network": False}, headers=platform.auth)
    assert answer.json() == {"cross_network": False, "sources": ["partner"]}, "what is absent stays"
    answer = await platform.http.post(PATH, json={"remove": ["partner"]}, headers=platform.auth)
    assert answer.json() == NOBODY
    assert platform.rows.rows.get("org/acme") is None


async def test_it_is_told_again_when_all_is_told(platform: TestPlatform) -> None:
    await platform.http.post(PATH, json={"cross_network": True}, headers=platform.auth)
    platform.rows.rows.clear()
    await platform.control.publication.publish_all()
    assert platform.rows.rows["org/acme"] == {"cross_network": True}


async def test_only_admins_and_only_for_orgs_that_they_see(platform: TestPlatform) -> None:
    others = await platform.admin("eve@example.com", "evil")
    assert (await platform.http.get(PATH, headers=others)).status_code == 404
    assert (await platform.http.post(PATH, json={"cross_network": True}, headers=others)).status_code == 404
    await platform.create_app("web")
    body = {"name": "ci", "app": "web", "expiry": "1h"}
    token = (await platform.http.post("/v1/tokens", json=body, headers=platform.auth)).json()["token"]
    deploy = {"authorization": f"Bearer {token}"}
    assert (await platform.http.post(PATH, json={"cross_network": True}, headers=deploy)).status_code == 403
    answer = await platform.http.post(PATH, json={"add": ["evil"]}, headers=platform.auth)
    assert answer.status_code == 404
    assert "evil" in answer.json()["error"]
    assert (await platform.http.get(PATH, headers=platform.auth)).json() == NOBODY


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ({"add": ["acme"]}, 400, "add: "),
        ({"remove": ["stranger"]}, 404, "stranger"),
        ({"cross_network": "yes"}, 400, "cross_network"),
    ],
    ids=["itself", "not-there", "type"],
)
async def test_what_is_wrong_is_named(platform: TestPlatform, body: dict[str, object], code: int, named: str) -> None:
    answer = await platform.http.post(PATH, json=body, headers=platform.auth)
    assert answer.status_code == code
    assert named in answer.json()["error"]


async def test_more_orgs_than_a_row_carries_are_refused(platform: TestPlatform) -> None:
    slugs = [f"{'x' * 50}-{index}" for index in range(9)]
    for slug in slugs:
        await platform.admin("ada@example.com", slug)
    answer = await platform.http.post(PATH, json={"add": slugs}, headers=platform.auth)
    assert answer.status_code == 400
    assert "remove one first" in answer.json()["error"]
    assert (await platform.http.get(PATH, headers=platform.auth)).json() == NOBODY
    assert (await platform.http.post(PATH, json={"add": slugs[:8]}, headers=platform.auth)).status_code == 200


async def test_the_commands(cli: Cli) -> None:
    await cli.platform.admin("ada@example.com", "partner")
    listed = await cli.run("orgs", "list", "--json")
    assert sorted(org["slug"] for org in json.loads(listed.out)) == ["acme", "partner"]

    added = await cli.run("orgs", "replay-sources", "add", "partner")
    assert (added.code, "partner" in added.err) == (0, True)
    assert json.loads((await cli.run("orgs", "replay-sources", "list", "--json")).out) == ["partner"]
    refused = await cli.run("orgs", "replay-sources", "remove", "partner")
    assert (refused.code != 0, "--yes" in refused.err) == (True, True)
    assert (await cli.run("orgs", "replay-sources", "remove", "partner", "-o", "acme", "--yes")).code == 0
    assert json.loads((await cli.run("orgs", "replay-sources", "list", "--json")).out) == []

    for command, allowed in (("enable", True), ("disable", False)):
        assert (await cli.run("orgs", "cross-network-replays", command, "--yes")).code == 0
        shown = await cli.run("orgs", "cross-network-replays", "status", "--json")
        assert json.loads(shown.out) == {"allowAllCrossNetworkReplays": allowed}
