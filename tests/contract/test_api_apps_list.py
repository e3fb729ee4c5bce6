"""`GET` and `POST /v1/apps` as the original describes them (flyctl-protocol reference 4.2 and 4.13)."""

from __future__ import annotations

import pytest

from pantala.testing.platform import TestPlatform

pytestmark = pytest.mark.anyio


async def test_a_list_says_whose_apps_it_wants(platform: TestPlatform) -> None:
    answer = await platform.http.get("/v1/apps", headers=platform.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "org_slug")


async def test_personal_is_the_callers_own_org(platform: TestPlatform) -> None:
    made = await platform.http.post("/v1/apps", json={"app_name": "web", "org_slug": "personal"}, headers=platform.auth)
    assert (made.status_code, made.json()["organization"]["slug"]) == (201, "acme")
    listed = await platform.http.get("/v1/apps?org_slug=personal", headers=platform.auth)
    assert [app["name"] for app in listed.json()["apps"]] == ["web"]


async def test_a_role_filters(platform: TestPlatform) -> None:
    await platform.create_app("web")
    body = {"name": "builder", "org_slug": "acme", "app_role_id": "remote-docker-builder"}
    await platform.http.post("/v1/apps", json=body, headers=platform.auth)
    listed = await platform.http.get("/v1/apps?org_slug=acme&app_role=remote-docker-builder", headers=platform.auth)
    assert [(app["name"], app["app_role"]) for app in listed.json()["apps"]] == [("builder", "remote-docker-builder")]
    assert listed.json()["total_apps"] == 1


async def test_what_is_not_offered_is_not_ignored(platform: TestPlatform) -> None:
    body = {"app_name": "web", "org_slug": "acme", "enable_subdomains": True}
    answer = await platform.http.post("/v1/apps", json=body, headers=platform.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (501, "enable_subdomains")
    assert (await platform.http.get("/v1/apps/web", headers=platform.auth)).status_code == 404


async def test_a_deploy_token_answers_a_token(platform: TestPlatform) -> None:
    await platform.create_app("web")
    answer = await platform.http.post("/v1/apps/web/deploy_token", json={"expiry": "1h"}, headers=platform.auth)
    assert answer.status_code == 200
    theirs = {"authorization": f"Bearer {answer.json()['token']}"}
    assert (await platform.http.get("/v1/apps/web/machines", headers=theirs)).status_code == 200
