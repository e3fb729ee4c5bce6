"""`fly-replay`: an app says where its request is to be answered. One proxy; what crosses hosts is in
test_proxy_replay_mesh.py, what is remembered in test_proxy_replay_cache.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from proxy_rig import Backend, Request, Rig, answer, machine_row, row, running
from replays import JSON, Apps, always, fields, once, replay, replay_json

from pantala.testing.poll import until
from pantala.wire.feed import OrgRow
from pantala.wire.machine import Concurrency, HTTPOptions, HTTPResponseOptions, Port

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
WORKERS = os.cpu_count() or 1


@pytest.fixture
async def apps(tmp_path: Path) -> AsyncIterator[Apps]:
    async with running(tmp_path, queue_timeout_ms=1_000, wake_timeout_ms=2_000) as rig:
        yield Apps(rig)


# -- where it goes -----------------------------------------------------------------------------------------------


async def test_the_answer_is_dropped_and_the_request_sent_to_the_named_machine(apps: Apps) -> None:
    await apps.app("web")
    asking = await apps.machine("web", "m1", 1, once(replay('instance=m2;state="cart 7, x"')))
    await apps.machine("web", "m2", 2)
    forged = {"fly-replay-src": "instance=x", "fly-replay-failed": "x", "fly-replay-cache-status": "hit"}
    for index in range(8):
        response = await apps.rig.get("web.test", f"/where?n={index}", **forged, **{"fly-force-instance-id": "m1"})
        assert (response.status_code, response.text) == (200, "m2")
        assert "fly-replay" not in response.headers
    request = apps.last("m2")
    assert request.path == "/where?n=7"
    told = request.header("fly-replay-src")
    assert told is not None
    assert told.startswith("instance=m1;region=iad;t=")
    assert told.endswith(";state=cart 7, x")
    assert fields(told)["t"].isdigit()
    assert len(fields(told)["t"]) == 16, "microseconds"
    assert request.header("fly-replay-failed") is None
    assert request.header("fly-replay-cache-status") is None
    assert apps.last("m1").header("fly-replay-src") is None, "a client's own word counts for nothing"
    assert asking.connections <= WORKERS, "the connection of the answer that was dropped is used again"


@pytest.mark.parametrize("form", ["header", "json"])
async def test_both_forms_say_the_same(apps: Apps, form: str) -> None:
    said = {"header": replay("app=other;state=s"), "json": replay_json(app="other", state="s")}[form]
    await apps.app("web")
    await apps.app("other")
    await apps.machine("web", "m1", 1, always(said))
    await apps.machine("other", "o1", 2)
    response = await apps.rig.get("web.test", "/a?b=c")
    assert response.text == "o1"
    request = apps.last("o1")
    assert request.path == "/a?b=c"
    assert request.header("host") == f"web.test:{apps.rig.ports.http}", "the request is the client's own"
    assert fields(request.header("fly-replay-src"))["state"] == "s"


async def test_a_kept_body_is_sent_again_and_a_larger_one_refused(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("other")

    async def count(backend: Backend, request: Request) -> bytes:
        return answer(f"{len(request.body)} {request.body[-3:].decode()}".encode())

    await apps.machine("web", "m1", 1, always(replay("app=other")))
    await apps.machine("other", "o1", 2, count)
    url, headers = f"http://{apps.rig.address}:{apps.rig.ports.http}/", {"host": "web.test"}
    async with httpx2.AsyncClient(trust_env=False, timeout=15) as client:
        for size in (3, 100_000, MIB):
            body = b"x" * (size - 1) + b"z"
            response = await client.post(url, content=body, headers=headers)
            assert response.text == f"{size} {body[-3:].decode()}"
        response = await client.post(url, content=b"x" * (MIB + 1), headers=headers)
        assert response.status_code == 413
        assert "PA01" in response.text
    entry = await apps.logged("PA01")
    assert (entry.app, entry.machine) == ("web", "m1")
    assert str(MIB) in entry.message


async def test_an_answer_before_the_end_of_the_body(apps: Apps) -> None:
    """The issuer decides by the head alone; what it never read goes to the next machine, whole."""
    await apps.app("web")
    await apps.app("other")
    port = apps.ports["web"]

    async def head_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(replay("app=other"))
        await writer.drain()
        closed.append(await reader.read())  # the rest of this attempt's body, until the proxy lets go
        writer.close()

    closed: list[bytes] = []

    async def echo(backend: Backend, request: Request) -> bytes:
        return answer(request.body)

    await apps.machine("other", "o1", 2, echo)
    async with await asyncio.start_server(head_only, "127.0.2.1", port):
        await apps.rig.agent.rows(machine_row("web", "m1", "127.0.2.1"))
        reader, writer = await asyncio.open_connection(apps.rig.address, apps.rig.ports.http)
        writer.write(b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 10\r\nConnection: close\r\n\r\nabc")
        await writer.drain()

        async def at_the_target() -> int:
            return apps.backends["o1"].connections

        await until(at_the_target, bool, within_s=10, every_s=0.01)
        writer.write(b"defghij")
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"abcdefghij")
        writer.close()
        await writer.wait_closed()

        async def let_go() -> list[bytes]:
            return closed

        await until(let_go, bool, within_s=10, every_s=0.01)


async def test_elsewhere_is_never_the_one_that_said_it(apps: Apps) -> None:
    await apps.app("web")
    for index in (1, 2, 3):
        await apps.machine("web", f"m{index}", index, once(replay("elsewhere=true")))
    for _ in range(12):
        response = await apps.rig.get("web.test")
        request = apps.last(response.text)
        assert fields(request.header("fly-replay-src"))["instance"] != response.text
    await apps.rig.agent.rows(row("routes", "m/m2", None), row("routes", "m/m3", None))
    response = await apps.rig.get("web.test")
    assert response.status_code == 503
    assert "PR01" in response.text


async def test_regions_in_order_with_aliases(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("by")
    for last, region in enumerate(("iad", "lhr", "nrt"), start=1):
        await apps.machine("by", region, last, region=region)
    wanted = "lhr"

    async def ask(backend: Backend, request: Request) -> bytes:
        return replay(f'app=by;region="{wanted}"')

    await apps.machine("web", "m1", 9, ask)
    for wanted, served in [
        ("lhr", "lhr"),
        ("fra,nrt,iad", "nrt"),
        ("eu,us", "lhr"),
        ("usa", "iad"),
        ("apac", "nrt"),
        ("sa,any", "iad"),
        ("sa", None),
    ]:
        response = await apps.rig.get("web.test")
        assert (response.text if response.status_code == 200 else None) == served, wanted


async def test_a_preferred_machine_that_is_away_is_named(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("other", concurrency=Concurrency(type="requests", soft_limit=1, hard_limit=1))
    await apps.machine("web", "m1", 1, always(replay("app=other;prefer_instance=o2")))
    await apps.machine("other", "o1", 2)
    response = await apps.rig.get("web.test", **{"fly-preferred-instance-unavailable": "forged"})
    assert response.text == "o1"
    assert apps.last("o1").header("fly-preferred-instance-unavailable") == "o2"
    release = asyncio.Event()

    async def hold(backend: Backend, request: Request) -> bytes:
        await release.wait()
        return answer(b"held")

    held = await apps.machine("other", "o2", 3, hold)
    first = asyncio.create_task(apps.rig.get("web.test"))

    async def inside() -> int:
        return held.busy

    await until(inside, bool, within_s=10, every_s=0.01)
    assert (await apps.rig.get("web.test")).text == "o1", "at its hard limit"
    assert apps.last("o1").header("fly-preferred-instance-unavailable") == "o2"
    release.set()
    assert (await first).text == "held"
    assert apps.last("o2").header("fly-preferred-instance-unavailable") is None


# -- changed on its way ------------------------------------------------------------------------------------------


async def test_transform_changes_what_the_target_sees(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("other")
    said = replay_json(
        app="other",
        transform={
            "path": "/new",
            "delete_headers": ["x-secret", "fly-prefer-region"],
            "set_headers": [{"name": "X-User", "value": "seven"}, {"name": "X-Kept", "value": "theirs"}],
        },
    )
    await apps.machine("web", "m1", 1, always(said))
    await apps.machine("other", "o1", 2)
    headers = {"x-secret": "1", "x-kept": "mine", "fly-prefer-region": "lhr"}
    assert (await apps.rig.get("web.test", "/old?q=1", **headers)).text == "o1"
    request = apps.last("o1")
    assert request.path == "/new?q=1"
    assert (request.header("x-secret"), request.header("fly-prefer-region")) == (None, None)
    assert (request.header("x-user"), request.header("x-kept")) == ("seven", "theirs")


async def test_each_replay_begins_with_the_clients_request(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("middle")
    await apps.app("last")
    transform = {"path": "/x", "set_headers": [{"name": "x-a", "value": "1"}]}
    changed = replay_json(app="middle", state="one", transform=transform)
    await apps.machine("web", "m1", 1, always(changed))
    await apps.machine("middle", "i1", 2, always(replay("app=last;state=two")))
    await apps.machine("last", "l1", 3)
    assert (await apps.rig.get("web.test", "/start")).text == "l1"
    assert (apps.last("i1").path, apps.last("i1").header("x-a")) == ("/x", "1")
    request = apps.last("l1")
    assert (request.path, request.header("x-a")) == ("/start", None)
    source = fields(request.header("fly-replay-src"))
    assert (source["instance"], source["state"]) == ("i1", "two")


async def test_the_answer_is_dressed_as_the_target_wishes(apps: Apps) -> None:
    def ports(pristine: bool, **headers: Any) -> list[Port]:
        options = HTTPOptions(response=HTTPResponseOptions(pristine=pristine, headers=headers))
        return [Port(port=apps.rig.ports.http, handlers=["http"], http_options=options)]

    await apps.app("web", ports=ports(False, **{"x-of": "web"}))
    await apps.app("other", ports=ports(True, **{"x-of": "other"}))
    await apps.machine("web", "m1", 1, always(replay("app=other")))
    await apps.machine("other", "o1", 2)
    response = await apps.rig.get("web.test")
    assert response.text == "o1"
    assert response.headers["x-of"] == "other"
    assert "via" not in response.headers


# -- what it may not do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "code", "named"),
    [
        pytest.param(replay("state=x"), "PA03", "names no target", id="nowhere"),
        pytest.param(replay("region=iad,ord"), "PA03", "quoted", id="unquoted-list"),
        pytest.param(replay("instance=a;prefer_instance=b"), "PA03", "exclude each other", id="combination"),
        pytest.param(replay("app=web", "Fly-Replay: app=other"), "PA03", "more than one", id="twice"),
        pytest.param(answer(b"{", "200 OK", JSON), "PA03", "JSON", id="broken-json"),
        pytest.param(answer(b" " * 70_000, "200 OK", JSON), "PA03", "JSON", id="large-json"),
        pytest.param(
            replay_json(app="web", transform={"set_headers": [{"name": "fly-client-ip", "value": "1"}]}),
            "PA03",
            "fly-client-ip",
            id="vouched-header",
        ),
        pytest.param(replay_json(app="web", transform={"path": "/a b"}), "PA03", "transform.path", id="path"),
        pytest.param(replay("app=gone"), "PA04", "gone", id="unknown-app"),
        pytest.param(replay("app=lab"), "PA05", "network", id="other-network"),
        pytest.param(replay("app=partner"), "PA05", "org", id="other-org"),
    ],
)
async def test_refused_with_a_code_and_a_word_in_the_apps_log(apps: Apps, said: bytes, code: str, named: str) -> None:
    await apps.app("web")
    await apps.app("lab", network=2)
    await apps.app("partner", org="partner", network=3)
    await apps.machine("web", "m1", 1, always(said))
    await apps.machine("lab", "l1", 2)
    await apps.machine("partner", "p1", 3)
    response = await apps.rig.get("web.test", accept="application/json")
    assert response.status_code == 502
    page = response.json()
    assert page["code"] == code
    entry = await apps.logged(code)
    assert (entry.app, entry.machine, entry.request_id) == ("web", "m1", page["request_id"])
    assert named in entry.message
    assert apps.asked("l1") == apps.asked("p1") == 0


async def test_an_org_may_allow_more(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("lab", network=2)
    await apps.app("partner", org="partner", network=3)
    target = "lab"

    async def ask(backend: Backend, request: Request) -> bytes:
        return replay(f"app={target}")

    await apps.machine("web", "m1", 1, ask)
    await apps.machine("lab", "l1", 2)
    await apps.machine("partner", "p1", 3)
    await apps.rig.agent.rows(row("routes", "org/acme", OrgRow(cross_network=True)))
    assert (await apps.rig.get("web.test")).text == "l1"
    target = "partner"
    assert (await apps.rig.get("web.test")).status_code == 502
    await apps.rig.agent.rows(row("routes", "org/partner", OrgRow(replay_from=["acme"])))
    assert (await apps.rig.get("web.test")).text == "p1"
    await apps.rig.agent.rows(row("routes", "org/partner", None))
    assert (await apps.rig.get("web.test")).status_code == 502


async def test_replays_end(apps: Apps) -> None:
    await apps.app("web")
    backend = await apps.machine("web", "m1", 1, always(replay("app=web")))
    response = await apps.rig.get("web.test")
    assert response.status_code == 502
    assert "PA02" in response.text
    assert len(backend.requests) == 11, "the request itself and ten replays"
    await apps.logged("PA02")


# -- when it comes to nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason", "instance"),
    [
        pytest.param("app=other;region=gru;fallback=force_self", "no_candidate", "", id="no-candidate"),
        pytest.param("app=other;instance=o9;fallback=prefer_self", "no_candidate", "o9", id="no-such-machine"),
        pytest.param("app=other;instance=o2;fallback=force_self", "retries_exhausted", "o2", id="retries"),
        pytest.param("app=other;instance=o1;timeout=200ms;fallback=prefer_self", "timeout", "o1", id="timeout"),
    ],
)
async def test_back_to_who_asked(apps: Apps, said: str, reason: str, instance: str) -> None:
    release = asyncio.Event()

    async def hang(backend: Backend, request: Request) -> bytes:
        await release.wait()
        return answer(b"too late")

    await apps.app("web")
    await apps.app("other")
    await apps.machine("web", "m1", 1, once(replay(said)))
    await apps.machine("web", "m2", 2, once(replay(said)))
    await apps.machine("other", "o1", 3, hang)
    refusing = await apps.machine("other", "o2", 4)
    await refusing.stop()
    response = await apps.rig.get("web.test", "/a", **{"fly-replay-failed": "forged"})
    assert response.status_code == 200
    request = apps.last(response.text)
    failure = fields(request.header("fly-replay-failed"))
    assert failure.pop("elapsed_ms").isdigit()
    region = "gru" if "gru" in said else ""
    source = {"instance": instance, "app": "other", "region": region, "replay_source": response.text, "reason": reason}
    assert failure == source
    assert request.header("fly-replay-src") is None
    assert request.path == "/a"
    release.set()


async def test_who_gets_it_back_must_answer(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("other")
    backend = await apps.machine("web", "m1", 1, always(replay("app=other;region=gru;fallback=force_self")))
    await apps.machine("other", "o1", 2)
    response = await apps.rig.get("web.test")
    assert response.status_code == 502
    assert "PA03" in response.text
    assert len(backend.requests) == 2


async def test_without_a_fallback_the_client_learns_why(apps: Apps) -> None:
    release = asyncio.Event()

    async def hang(backend: Backend, request: Request) -> bytes:
        await release.wait()
        return answer(b"too late")

    await apps.app("web")
    await apps.app("other")
    await apps.machine("web", "m1", 1, always(replay("app=other;timeout=100ms")))
    await apps.machine("other", "o1", 2, hang)
    response = await apps.rig.get("web.test")
    assert response.status_code == 503
    assert "within the time" in response.text
    release.set()


# -- upgrades ----------------------------------------------------------------------------------------------------


def upgrade(host: str) -> bytes:
    return (
        f"GET /ws HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


async def sockets(rig: Rig, host: str) -> bytes:
    """Through the upgrade and back, byte for byte."""
    reader, writer = await asyncio.open_connection(rig.address, rig.ports.http)
    try:
        writer.write(upgrade(host))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.write(b"ping")
        return head.split(b"\r\n")[0] + b" " + await asyncio.wait_for(reader.readexactly(4), 10)
    finally:
        writer.close()
        await writer.wait_closed()


async def refuse_upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(replay("app=other"))
    await writer.drain()
    writer.close()


async def test_an_upgrade_that_was_not_accepted_goes_on(apps: Apps) -> None:
    await apps.app("web")
    await apps.app("other")
    await apps.machine("other", "o1", 2)
    async with await asyncio.start_server(refuse_upgrade, "127.0.2.1", apps.ports["web"]):
        await apps.rig.agent.rows(machine_row("web", "m1", "127.0.2.1"))
        assert await sockets(apps.rig, "web.test") == b"HTTP/1.1 101 Switching Protocols ping"
    request = apps.last("o1")
    assert fields(request.header("fly-replay-src"))["instance"] == "m1"


# -- what clients say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "served"),
    [
        pytest.param({}, "iad", id="nearest"),
        pytest.param({"fly-prefer-region": "gru, apac ,lhr"}, "nrt", id="prefer-alias"),
        pytest.param({"fly-prefer-region": "gru"}, "iad", id="prefer-none"),
        pytest.param({"fly-force-region": "gru,eu"}, "lhr", id="force-alias"),
        pytest.param({"fly-force-region": "gru"}, None, id="force-none"),
        pytest.param({"fly-prefer-instance-id": "lhr"}, "lhr", id="prefer-instance"),
        pytest.param({"fly-force-instance-id": "nrt"}, "nrt", id="force-instance"),
        pytest.param({"fly-force-instance-id": "gone"}, None, id="force-none-such"),
        pytest.param({"fly-force-instance-id": "nrt", "fly-force-region": "iad"}, None, id="both-conditions"),
    ],
)
async def test_clients_choose(apps: Apps, headers: dict[str, str], served: str | None) -> None:
    await apps.app("web")
    for last, region in enumerate(("iad", "lhr", "nrt"), start=1):
        await apps.machine("web", region, last, region=region)
    response = await apps.rig.get("web.test", **headers)
    assert (response.status_code, response.text) == (200, served) if served else response.status_code == 503


async def test_a_forced_machine_is_waited_for_while_it_is_unhealthy(apps: Apps) -> None:
    await apps.app("web")
    await apps.machine("web", "m1", 1, passing=[False])
    await apps.machine("web", "m2", 2)
    headers = {"fly-force-instance-id": "m1"}
    asking = asyncio.create_task(apps.rig.get("web.test", **headers))
    await apps.rig.get("web.test")
    await apps.rig.agent.rows(machine_row("web", "m1", "127.0.2.1"))
    assert (await asking).text == "m1"
    await apps.rig.agent.rows(machine_row("web", "m1", "127.0.2.1", passing=[False]))
    response = await apps.rig.get("web.test", **headers)
    assert response.status_code == 503, "it stayed unhealthy for as long as requests wait"
    assert "PR01" in response.text
