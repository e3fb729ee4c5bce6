"""Containers by the Machines API: images become digests when a machine is accepted, mistakes are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from pantala.testing.platform import TestPlatform

pytestmark = pytest.mark.anyio

MACHINES = "/v1/apps/web/machines"
WEB = {"name": "web", "image": "registry.pantala.test/web:v1", "depends_on": [{"name": "db", "condition": "started"}]}
DB = {"name": "db", "image": "docker.io/library/redis:7"}


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


async def post(web: TestPlatform, **config: Any) -> Any:
    return await web.http.post(MACHINES, json={"config": config}, headers=web.auth)


async def test_a_machine_of_containers_needs_no_image_of_its_own(web: TestPlatform) -> None:
    made = await post(web, containers=[WEB, DB])
    assert made.status_code == 200, made.text
    document = made.json()
    assert (document["image_ref"]["repository"], document["image_ref"]["tag"]) == ("web", "v1")
    assert document["config"]["containers"] == [WEB, DB]
    assert "image" not in document["config"]
    again = await web.http.post(f"{MACHINES}/{document['id']}", json={"config": {"containers": [DB]}}, headers=web.auth)
    assert (again.status_code, again.json()["image_ref"]["repository"]) == (200, "redis")


async def test_an_image_that_is_not_there_refuses_the_machine_and_is_named(web: TestPlatform) -> None:
    web.registry.missing.add(DB["image"])
    answer = await post(web, containers=[WEB, DB])
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("config.containers[1].image: image not found")
    assert (await web.http.get(MACHINES, headers=web.auth)).json() == []


async def test_a_circle_is_refused(web: TestPlatform) -> None:
    answer = await post(web, containers=[WEB, DB | {"depends_on": [{"name": "web"}]}])
    assert answer.status_code == 400
    assert "web → db → web" in answer.json()["error"]
