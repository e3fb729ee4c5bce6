"""Releases, logs and builds."""

from __future__ import annotations

import io
import tarfile
from datetime import datetime

import anyio
import httpx2
import msgspec
import pytest
from golden import check

from pantala.testing.fake_registry import claims_of
from pantala.testing.platform import TestPlatform, serve_http
from pantala.wire.api import BuildEvent, LogLine

pytestmark = pytest.mark.anyio

RELEASES = "/v1/apps/web/releases"


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


async def release(web: TestPlatform, **more: object) -> dict[str, object]:
    answer = await web.http.post(RELEASES, json={"image": "registry/web:1"} | more, headers=web.auth)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_a_release_from_pending_to_complete_deploys_its_app(web: TestPlatform) -> None:
    body = {"image": "registry/web:1", "definition": '{"app": "web"}', "strategy": "ROLLING"}
    made = await web.http.post(RELEASES, json=body, headers=web.auth)
    check("release_create", made)
    one = f"{RELEASES}/{made.json()['id']}"
    update = {"status": "running", "plan": '[{"step": 1}]', "cursor": 0}
    assert (await web.http.patch(one, json=update, headers=web.auth)).json()["status"] == "running"
    assert (await web.http.patch(one, json={"cursor": 1}, headers=web.auth)).json()["cursor"] == 1
    assert (await web.http.get("/v1/apps/web", headers=web.auth)).json()["status"] == "pending"
    assert (await web.http.patch(one, json={"status": "complete"}, headers=web.auth)).status_code == 200
    assert (await web.http.get("/v1/apps/web", headers=web.auth)).json()["status"] == "deployed"
    assert (await web.http.get(f"{RELEASES}/current", headers=web.auth)).json()["plan"] == '[{"step": 1}]'
    assert (await web.http.get(f"{one}/definition", headers=web.auth)).json() == {"app": "web"}


@pytest.mark.parametrize("final", ["complete", "failed", "interrupted"])
async def test_a_final_status_stays(web: TestPlatform, final: str) -> None:
    one = f"{RELEASES}/{(await release(web))['id']}"
    assert (await web.http.patch(one, json={"status": final, "reason": "why"}, headers=web.auth)).status_code == 200
    assert (await web.http.patch(one, json={"status": final}, headers=web.auth)).status_code == 200
    for change in ({"status": "running"}, {"plan": "x"}, {"cursor": 3}):
        answer = await web.http.patch(one, json=change, headers=web.auth)
        assert (answer.status_code, answer.json()["status"]) == (412, "wrong_state")


async def test_versions_count_up_and_are_listed_newest_first(web: TestPlatform) -> None:
    versions = [(await release(web))["version"] for _ in range(3)]
    assert versions == [1, 2, 3]
    listed = (await web.http.get(f"{RELEASES}?limit=2", headers=web.auth)).json()["releases"]
    assert [found["version"] for found in listed] == [3, 2]
    assert (await web.http.get(f"{RELEASES}/current", headers=web.auth)).status_code == 404


async def test_a_release_that_changed_nothing_is_withdrawn_and_its_version_used_again(web: TestPlatform) -> None:
    await release(web)
    for status in ("pending", "running"):
        made = await release(web)
        assert made["version"] == 2
        one = f"{RELEASES}/{made['id']}"
        if status == "running":
            await web.http.patch(one, json={"status": status, "plan": "[]", "cursor": 0}, headers=web.auth)
        others = await web.admin(f"{status}@example.com", f"others-{status}")
        assert (await web.http.delete(one, headers=others)).status_code == 404
        assert (await web.http.delete(one, headers=web.auth)).status_code == 204
        assert (await web.http.delete(one, headers=web.auth)).status_code == 404
        listed = (await web.http.get(RELEASES, headers=web.auth)).json()["releases"]
        assert [found["version"] for found in listed] == [1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": "complete"}, "is complete"),
        ({"status": "failed"}, "is failed"),
        ({"status": "running", "cursor": 1}, "has changed machines"),
        (None, "is not the newest"),
    ],
    ids=["complete", "failed", "in the middle", "old"],
)
async def test_a_release_with_a_story_is_not_withdrawn(
    web: TestPlatform, change: dict[str, object] | None, why: str
) -> None:
    one = f"{RELEASES}/{(await release(web))['id']}"
    if change is None:
        await release(web)
    else:
        assert (await web.http.patch(one, json=change, headers=web.auth)).status_code == 200
    answer = await web.http.delete(one, headers=web.auth)
    assert (answer.status_code, answer.json()["status"]) == (412, "wrong_state")
    assert why in answer.json()["error"]
    assert (await web.http.get(one, headers=web.auth)).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"image": ""}, "image"),
        ({"image": "x", "strategy": "yolo"}, "strategy"),
        ({"image": "x", "definition": "{"}, "definition"),
    ],
    ids=["empty", "image", "strategy", "definition"],
)
async def test_bad_releases_name_the_field(web: TestPlatform, body: dict[str, object], field: str) -> None:
    answer = await web.http.post(RELEASES, json=body, headers=web.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, field)


# -- logs --------------------------------------------------------------------------------------------------------


async def test_logs_of_several_hosts_come_in_order_and_go_on_from_a_token(web: TestPlatform) -> None:
    second = await web.add_agent("node-2", region="lhr")
    here = (await web.create_machine("web"))["id"]
    there = (await web.create_machine("web", region="lhr"))["id"]
    web.agents["node-1"].say(here, "one")
    await anyio.sleep(0.002)
    second.say(there, "two")
    logs = "/v1/apps/web/logs"
    answer = (await web.http.get(logs, headers=web.auth)).json()
    assert [line["message"] for line in answer["lines"]] == ["one", "two"]
    after = f"{logs}?next_token={answer['next_token']}"
    assert (await web.http.get(after, headers=web.auth)).json() == {"lines": [], "next_token": answer["next_token"]}
    await anyio.sleep(0.002)
    web.agents["node-1"].say(here, "three")
    assert [line["message"] for line in (await web.http.get(after, headers=web.auth)).json()["lines"]] == ["three"]
    only = (await web.http.get(f"{logs}?instance={there}", headers=web.auth)).json()["lines"]
    assert [line["message"] for line in only] == ["two"]
    assert len((await web.http.get(f"{logs}?region=iad", headers=web.auth)).json()["lines"]) == 2
    assert (await web.http.get(f"{logs}?next_token=x", headers=web.auth)).status_code == 400


async def test_a_stock_client_polls_for_lines(web: TestPlatform) -> None:
    """flyctl-protocol reference 9.1: `next_token=` at first; lines have it ask again at once, so none come twice."""
    second = await web.add_agent("node-2", region="lhr")
    here = (await web.create_machine("web"))["id"]
    there = (await web.create_machine("web", region="lhr"))["id"]
    logs = "/api/v1/apps/web/logs"
    nothing = (await web.http.get(f"{logs}?next_token=", headers=web.auth)).json()
    assert nothing["data"] == []
    web.agents["node-1"].say(here, "one")
    await anyio.sleep(0.002)
    second.say(there, "two")
    first = (await web.http.get(f"{logs}?next_token={nothing['meta']['next_token']}", headers=web.auth)).json()
    one, two = (entry["attributes"] for entry in first["data"])
    assert {key: one[key] for key in ("message", "level", "instance", "region")} == {
        "message": "one",
        "level": "info",
        "instance": here,
        "region": "iad",
    }
    assert one["meta"] == {"instance": here, "region": "iad", "event": {"provider": "app"}}
    assert one["timestamp"] < two["timestamp"]
    assert datetime.fromisoformat(one["timestamp"]).tzinfo is not None
    assert len({entry["id"] for entry in first["data"]}) == 2
    after = f"{logs}?next_token={first['meta']['next_token']}"
    assert (await web.http.get(after, headers=web.auth)).json() == {"data": [], "meta": first["meta"]}
    only = (await web.http.get(f"{logs}?next_token=&region=lhr", headers=web.auth)).json()["data"]
    assert [entry["attributes"]["message"] for entry in only] == ["two"]
    only = (await web.http.get(f"{logs}?next_token=&instance={here}", headers=web.auth)).json()["data"]
    assert [entry["attributes"]["message"] for entry in only] == ["one"]
    assert (await web.http.get("/api/v1/apps/nope/logs?next_token=", headers=web.auth)).status_code == 404
    assert (await web.http.get(f"{logs}?next_token=", headers={"authorization": "Bearer x"})).status_code == 401


async def test_what_edges_say_of_an_app_is_in_its_log_wherever_its_machines_are(web: TestPlatform) -> None:
    edge = await web.add_agent("node-2", region="lhr")
    here = (await web.create_machine("web"))["id"]
    edge.say_at_the_edge("web", "[PT05] no certificate")
    edge.say_at_the_edge("other", "[PT05] not yours")
    logs = "/v1/apps/web/logs"
    lines = (await web.http.get(logs, headers=web.auth)).json()["lines"]
    assert [line["message"] for line in lines] == ["[PT05] no certificate"]
    assert (await web.http.get(f"{logs}?instance={here}", headers=web.auth)).json()["lines"] == []
    async with serve_http(web) as url, httpx2.AsyncClient(base_url=url, headers=web.auth) as http:
        with anyio.fail_after(10):
            async with http.stream("GET", f"{logs}?follow=true") as answer:
                seen = [msgspec.json.decode(await anext(answer.aiter_lines()), type=LogLine).message]
    assert seen == ["[PT05] no certificate"]


async def test_following_logs_streams_each_new_line(web: TestPlatform) -> None:
    machine = (await web.create_machine("web"))["id"]
    agent = web.agents["node-1"]
    agent.say(machine, "first")
    seen: list[str] = []
    async with serve_http(web) as url, httpx2.AsyncClient(base_url=url, headers=web.auth) as http:
        with anyio.fail_after(10):
            async with http.stream("GET", "/v1/apps/web/logs?follow=true") as answer:
                assert answer.headers["content-type"].startswith("application/x-ndjson")
                async for text in answer.aiter_lines():
                    seen.append(msgspec.json.decode(text, type=LogLine).message)
                    if len(seen) == 3:
                        break
                    await anyio.sleep(0.002)
                    agent.say(machine, f"line {len(seen)}")
    assert seen == ["first", "line 1", "line 2"]


# -- builds ------------------------------------------------------------------------------------------------------


def context(**files: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


async def test_a_build_streams_events_and_ends_with_its_image(web: TestPlatform) -> None:
    headers = web.auth | {"pantala-build-options": '{"tag": "v7", "dockerfile": "Dockerfile.prod"}'}
    body = context(Dockerfile="FROM scratch", main="x")
    answer = await web.http.post("/v1/apps/web/builds", content=body, headers=headers)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    events = [msgspec.json.decode(line, type=BuildEvent) for line in answer.text.splitlines()]
    assert [event.type for event in events] == ["step", "done"]
    assert events[-1].image == "registry.pantala.test/web:v7"
    assert web.builder.contexts == [["Dockerfile", "main"]]
    access = claims_of(web.builder.push_tokens[0])["access"]
    assert {"type": "repository", "name": "web", "actions": ["pull", "push"]} in access
    assert all(entry["name"] == "web" or entry["actions"] == ["pull"] for entry in access)
    folder = web.control.builds._folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "content", "field"),
    [
        ('{"tag": "no spaces"}', context(a="x"), "tag"),
        ('{"dockerfile": "../Dockerfile"}', context(a="x"), "dockerfile"),
        ('{"args": {"A": 1}}', context(a="x"), "args[...]"),
        ("{}", b"not a tar", "context"),
        ("{}", context(**{"../evil": "x"}), "context"),
    ],
    ids=["tag", "dockerfile", "args", "archive", "escape"],
)
async def test_bad_builds_are_refused_before_they_begin(
    web: TestPlatform, options: str, content: bytes, field: str
) -> None:
    headers = web.auth | {"pantala-build-options": options}
    answer = await web.http.post("/v1/apps/web/builds", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, field), answer.text
    assert web.builder.contexts == []


async def test_an_upload_has_a_bound(web: TestPlatform) -> None:
    from pantala.control.contexts import Bounds

    web.control.builds.bounds = Bounds(upload_bytes=100)
    answer = await web.http.post("/v1/apps/web/builds", content=bytes(1000), headers=web.auth)
    assert (answer.status_code, "larger than 100 bytes" in answer.json()["error"]) == (400, True)


async def test_only_who_may_deploy_may_build(web: TestPlatform) -> None:
    others = await web.admin("eve@example.com", "evil")
    answer = await web.http.post("/v1/apps/web/builds", content=context(a="x"), headers=others)
    assert answer.status_code == 404
