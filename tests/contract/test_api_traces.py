"""Requests over the API: who is asked, who may read what, what is said of ids that lead nowhere."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from pantala.kit import ids
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.platform import TestPlatform
from pantala.wire.feed import TraceRecord
from pantala.wire.node import TraceRequest

pytestmark = pytest.mark.anyio


def record(role: str, app: str = "web", **more: Any) -> TraceRecord:
    known: dict[str, Any] = {
        "role": role,
        "outcome": "answered",
        "began_us": 1,
        "app": app,
        "attempt": 1,
        "status": 200,
    }
    return TraceRecord(**known | more)


@pytest.fixture
async def lhr(platform: TestPlatform) -> FakeAgent:
    await platform.create_app("web")
    return await platform.add_agent("node-lhr", region="lhr")


def now_id(platform: TestPlatform, *, ago_ms: int = 0) -> str:
    return ids.ulid(platform.control.context.now_ms() - ago_ms)


async def get(platform: TestPlatform, request_id: str, auth: dict[str, str] | None = None) -> httpx2.Response:
    return await platform.http.get(f"/v1/traces/{request_id}", headers=auth or platform.auth)


def asked(agent: FakeAgent) -> int:
    return sum(isinstance(call, TraceRequest) for call in agent.calls)


async def test_the_edge_comes_first_and_the_host_that_it_names_is_asked(platform: TestPlatform, lhr: FakeAgent) -> None:
    far = await platform.add_agent("node-far", region="nrt")
    iad, request_id = platform.agents["node-1"], now_id(platform)
    iad.traces[request_id] = [record("edge", machine="m1", node="node-lhr", region="lhr")]
    lhr.traces[request_id] = [record("worker", machine="m1", node="node-lhr", region="lhr", began_us=2)]
    answer = await get(platform, f"{request_id}-iad")
    assert answer.status_code == 200, answer.text
    assert [(part["host"], part["region"], part["records"][0]["role"]) for part in answer.json()["parts"]] == [
        ("node-1", "iad", "edge"),
        ("node-lhr", "lhr", "worker"),
    ]
    assert answer.json()["unheard"] == []
    assert (asked(iad), asked(lhr), asked(far)) == (1, 1, 0)


@pytest.mark.parametrize("suffix", ["", "-iad", "-xyz"], ids=["no region", "another region", "no such region"])
async def test_without_the_right_region_all_hosts_are_asked(
    platform: TestPlatform, lhr: FakeAgent, suffix: str
) -> None:
    request_id = now_id(platform)
    lhr.traces[request_id] = [record("edge")]
    answer = await get(platform, request_id.lower() + suffix)
    assert [part["host"] for part in answer.json()["parts"]] == ["node-lhr"]


async def test_others_learn_nothing_not_even_that_there_is_such_a_request(
    platform: TestPlatform, lhr: FakeAgent
) -> None:
    other = await platform.admin("eve@else.test", "else")
    request_id, unknown = now_id(platform), now_id(platform)
    lhr.traces[request_id] = [record("edge"), record("edge", app="gone")]
    refused, missing = await get(platform, request_id, other), await get(platform, unknown, other)
    assert refused.status_code == missing.status_code == 404
    assert refused.json() == missing.json()
    assert (await get(platform, request_id, {"authorization": "Bearer nobody"})).status_code == 401


async def test_of_a_replay_between_orgs_each_sees_its_own_tries(platform: TestPlatform, lhr: FakeAgent) -> None:
    other = await platform.admin("eve@else.test", "else")
    body = {"app_name": "theirs", "org_slug": "else"}
    (await platform.http.post("/v1/apps", json=body, headers=other)).raise_for_status()
    request_id = now_id(platform)
    lhr.traces[request_id] = [record("edge"), record("edge", app="theirs", attempt=2)]
    for auth, app in ((platform.auth, "web"), (other, "theirs")):
        (part,) = (await get(platform, request_id, auth)).json()["parts"]
        assert [one["app"] for one in part["records"]] == [app]


async def test_what_is_of_no_app_is_the_operators(platform: TestPlatform, lhr: FakeAgent) -> None:
    other = await platform.admin("eve@else.test", "else")
    request_id = now_id(platform)
    lhr.traces[request_id] = [record("edge", app="", status=404, outcome="refused", attempt=0)]
    assert (await get(platform, request_id)).status_code == 200
    assert (await get(platform, request_id, other)).status_code == 404


async def test_hosts_that_do_not_answer_are_named(platform: TestPlatform, lhr: FakeAgent) -> None:
    request_id = now_id(platform)
    platform.agents["node-1"].traces[request_id] = [record("edge", node="node-lhr", machine="m1", region="lhr")]
    lhr.silent = True
    answer = await get(platform, f"{request_id}-iad")
    assert [one["host"] for one in answer.json()["unheard"]] == ["node-lhr"]
    missing = await get(platform, now_id(platform))
    assert missing.status_code == 404
    assert "not heard: node-lhr" in missing.json()["error"]
    platform.agents["node-1"].silent = True
    nobody = await get(platform, request_id)
    assert "no host answers" in nobody.json()["error"]


async def test_too_old_never_seen_and_no_id_are_different_answers(platform: TestPlatform, lhr: FakeAgent) -> None:
    lhr.traces_since_ms = platform.control.context.now_ms() - 60_000
    old = await get(platform, now_id(platform, ago_ms=120_000))
    assert old.status_code == 404
    assert "not kept any longer" in old.json()["error"]
    assert "60 s" in old.json()["error"]
    never = await get(platform, now_id(platform, ago_ms=30_000))
    assert never.status_code == 404
    assert "no request with this id is known" in never.json()["error"]
    future = await get(platform, now_id(platform, ago_ms=-3_600_000))
    assert "time to come" in future.json()["error"]
    for text in ("nonsense", "8ZZZZZZZZZZZZZZZZZZZZZZZZZ", "01ARZ3NDEKTSV4RRFFQ69G5FAI", f"{now_id(platform)}-"):
        malformed = await get(platform, text)
        assert (malformed.status_code, malformed.json()["status"]) == (400, "invalid_request"), text
        assert "is not a request id" in malformed.json()["error"]
