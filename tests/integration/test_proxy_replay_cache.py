"""Replays that the edge remembers: for a path, for a client's cookie or header; found, passed over, forgotten."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from proxy_rig import Backend, Request, answer, machine_row, row, running
from replays import Apps, always, by, replay, replay_json

from pantala.wire.feed import AppRow
from pantala.wire.machine import HTTPOptions, Port, ReplayCache

pytestmark = pytest.mark.anyio

STATUS = "fly-replay-cache-status"


@pytest.fixture
async def apps(tmp_path: Path) -> AsyncIterator[Apps]:
    async with running(tmp_path, queue_timeout_ms=1_000, wake_timeout_ms=2_000) as rig:
        yield Apps(rig)


async def routed(apps: Apps, said: bytes, *, org: str = "acme") -> None:
    await apps.app("web")
    await apps.app("other", org=org)
    await apps.machine("web", "m1", 1, always(said))
    await apps.machine("other", "o1", 2)


def cached(rule: str, *headers: str) -> bytes:
    return replay("app=other", f"fly-replay-cache: {rule}", "fly-replay-cache-ttl-secs: 60", *headers)


async def test_a_path_is_asked_for_once(apps: Apps) -> None:
    await routed(apps, cached("/a/*"))
    for index, (path, status) in enumerate([("/a/b", "miss"), ("/a/b", "hit"), ("/a", "hit"), ("/a/c?x=1", "hit")]):
        response = await apps.rig.get("web.test", path, **{STATUS: "forged"})
        assert (response.text, apps.last("o1").header(STATUS), apps.asked("o1")) == ("o1", status, index + 1)
        assert apps.last("o1").path == path
        assert (apps.last("o1").header("fly-replay-src") is None) == (status == "hit")
    assert apps.asked("m1") == 1
    assert (await apps.rig.get("web.test", "/other")).text == "o1"
    assert apps.asked("m1") == 2
    assert apps.last("o1").header(STATUS) is None, "the rule does not cover that request"
    entry = await apps.logged("PA03")
    assert "/a/*" in entry.message
    assert "not cached" in entry.message


async def test_the_json_form(apps: Apps) -> None:
    await routed(apps, replay_json(app="other", cache={"prefix": "web.test/a/*", "ttl": 60}, allow_bypass=True))
    assert [(await apps.rig.get("web.test", "/a/b")).text for _ in range(3)] == ["o1"] * 3
    assert (apps.asked("m1"), apps.last("o1").header(STATUS)) == (1, "hit")
    await apps.rig.get("web.test", "/a/b", **{"fly-replay-cache-control": "skip"})
    assert (apps.asked("m1"), apps.last("o1").header(STATUS)) == (2, "bypass")


@pytest.mark.parametrize("allowed", [True, False], ids=["allowed", "not-allowed"])
async def test_clients_pass_it_over_only_where_they_may(apps: Apps, allowed: bool) -> None:
    await routed(apps, cached("/*", *(["fly-replay-cache-allow-bypass: yes"] if allowed else [])))
    skip = {"fly-replay-cache-control": "skip"}
    assert (await apps.rig.get("web.test", "/", **skip)).text == "o1"
    assert apps.last("o1").header(STATUS) == "miss", "there was nothing to pass over"
    assert (await apps.rig.get("web.test", "/", **skip)).text == "o1"
    assert (apps.asked("m1"), apps.last("o1").header(STATUS)) == ((2, "bypass") if allowed else (1, "hit"))


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(replay("app=other;state=s", "fly-replay-cache: /*"), id="state"),
        pytest.param(replay("app=other;timeout=5s", "fly-replay-cache: /*"), id="timeout"),
        pytest.param(replay("app=other;fallback=force_self", "fly-replay-cache: /*"), id="fallback"),
        pytest.param(replay_json(app="other", transform={"path": "/x"}, cache={"prefix": "/*"}), id="transform"),
    ],
)
async def test_what_differs_from_request_to_request_is_not_remembered(apps: Apps, said: bytes) -> None:
    await routed(apps, said)
    for _ in range(2):
        assert (await apps.rig.get("web.test")).text == "o1"
        assert apps.last("o1").header(STATUS) is None
    assert apps.asked("m1") == 2
    await apps.logged("PA03")


async def test_the_target_has_it_forgotten(apps: Apps) -> None:
    """It sends the request back to where the replay came from, which then says something else."""
    target = "other"

    def ask(request: Request) -> bytes:
        return replay(f"app={target}", "fly-replay-cache: /*", "fly-replay-cache-ttl-secs: 60")

    moved = False

    def serve(request: Request) -> bytes:
        return replay("app=web", "fly-replay-cache: invalidate") if moved else answer(b"o1")

    await apps.app("web")
    await apps.app("other")
    await apps.app("third")
    await apps.machine("web", "m1", 1, by(ask))
    await apps.machine("other", "o1", 2, by(serve))
    await apps.machine("third", "t1", 3)
    assert [(await apps.rig.get("web.test")).text for _ in range(2)] == ["o1", "o1"]
    moved, target = True, "third"
    assert (await apps.rig.get("web.test")).text == "t1"
    assert apps.asked("m1") == 2, "the app was asked anew"
    asked = apps.asked("o1")
    assert (await apps.rig.get("web.test")).text == "t1"
    assert (apps.asked("o1"), apps.asked("m1"), apps.last("t1").header(STATUS)) == (asked, 2, "hit")


async def test_nobody_else_has_it_forgotten(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("other")
    await apps.app("mean")
    await apps.machine("web", "m1", 1, by(lambda r: cached("/*") if r.path == "/" else replay("app=mean")))
    await apps.machine("other", "o1", 2)
    await apps.machine("mean", "x1", 3, always(replay("app=other", "fly-replay-cache: invalidate")))
    await apps.rig.get("web.test", "/")
    assert (await apps.rig.get("web.test", "/x")).text == "o1"
    assert apps.last("o1").header(STATUS) == "hit"
    asked = apps.asked("m1")
    await apps.rig.get("web.test", "/")
    assert apps.asked("m1") == asked


def sticky(apps: Apps, **rule: Any) -> list[Port]:
    rules = [ReplayCache(path_prefix="/", ttl_seconds=60, **rule)]
    return [Port(port=apps.rig.ports.http, handlers=["http"], http_options=HTTPOptions(replay_cache=rules))]


@pytest.mark.parametrize("kind", ["cookie", "header"])
async def test_a_clients_value_is_asked_for_once(apps: Apps, kind: str) -> None:
    name = {"cookie": "sid", "header": "x-user"}[kind]
    await apps.app("web")
    await apps.app("route", ports=sticky(apps, type=kind, name=name, allow_bypass=True))
    asked = 0

    async def ask(backend: Backend, request: Request) -> bytes:
        nonlocal asked
        asked += 1
        user = request.header("x-user") or (request.header("cookie") or "sid=").split("sid=")[1]
        return replay(f"app=web;instance=m{user}") if user else answer(b"nobody")

    await apps.machine("route", "r1", 9, ask)
    await apps.machine("web", "m1", 1)
    await apps.machine("web", "m2", 2)

    async def get(user: str, **more: str) -> str:
        value = {"cookie": f"a=b; sid={user}"} if kind == "cookie" else {"x-user": user}
        return (await apps.rig.get("route.test", "/any", **(value if user else {}), **more)).text

    assert [await get("1"), await get("2"), await get("1"), await get("2")] == ["m1", "m2", "m1", "m2"]
    assert asked == 2
    assert [apps.last(machine).header(STATUS) for machine in ("m1", "m2")] == ["hit", "hit"]
    assert await get("") == "nobody"
    assert await get("1", **{"fly-replay-cache-control": "skip"}) == "m1"
    assert (asked, apps.last("m1").header(STATUS)) == (4, "bypass")


@pytest.mark.parametrize("how", ["gone", "unhealthy", "refusing", "moved-to-another-org"])
async def test_a_stale_entry_never_fails_a_request(apps: Apps, how: str) -> None:
    stale = False
    rule = ["fly-replay-cache: /*", "fly-replay-cache-ttl-secs: 60"]
    await apps.app("web")
    await apps.app("other")
    await apps.machine("web", "m1", 1, by(lambda r: answer(b"m1") if stale else replay("app=other;instance=o1", *rule)))
    target = await apps.machine("other", "o1", 2)
    assert [(await apps.rig.get("web.test")).text for _ in range(2)] == ["o1", "o1"]
    stale = True
    match how:
        case "gone":
            await apps.rig.agent.rows(row("routes", "m/o1", None))
        case "unhealthy":
            await apps.rig.agent.rows(machine_row("other", "o1", "127.0.2.2", passing=[False]))
        case "refusing":
            await target.stop()
        case _:
            await apps.rig.agent.rows(row("routes", "app/other", AppRow(app="other", org="else", network=9)))
    response = await apps.rig.get("web.test")
    assert (response.status_code, response.text) == (200, "m1")
    assert apps.last("m1").header(STATUS) is None
    asked = apps.asked("m1")
    assert (await apps.rig.get("web.test")).text == "m1"
    assert apps.asked("m1") == asked + 1
