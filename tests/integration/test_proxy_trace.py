"""Where a request was and how long each step took, as the proxies keep it: one proxy, and two over the mesh."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mesh_rig import HOST, Cluster, Host, Waker, cluster
from proxy_rig import WITHIN_S, Backend, Request, Rig, answer, app_rows, machine_row, running, service_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import Trace, TraceRecord

pytestmark = pytest.mark.anyio

ID = "fly-request-id"


async def records(rig: Rig, request_id: str) -> list[TraceRecord]:
    """Once the last answer is over: a client may have read it before the proxy has seen its end."""

    async def look() -> list[TraceRecord]:
        document = json.loads(await rig.admin(f"/trace/{request_id}") or "{}")
        return msgspec.convert(document["records"], list[TraceRecord])

    def over(found: list[TraceRecord]) -> bool:
        return all(one.body_us is not None for one in found if one.outcome == "answered")

    return await until(look, over, within_s=WITHIN_S, every_s=0.01)


def until_head(record: TraceRecord) -> int:
    return record.choose_us + record.connect_us + record.answer_us


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncGenerator[Rig]:
    async with running(tmp_path) as made:
        yield made


async def serve(rig: Rig, *machines: tuple[str, str], handler: Any = None, state: str = "started") -> list[Backend]:
    port = free_port()
    made = [await rig.backend(name, ip, port, *([handler] if handler else [])) for name, ip in machines]
    rows = [machine_row("web", name, ip, state) for name, ip in machines]
    await rig.agent.rows(*app_rows("web", HOST), service_row(rig.ports, "web", port), *rows)
    return made


# -- one proxy ---------------------------------------------------------------------------------------------------


async def test_steps_add_up_to_what_the_client_waited(rig: Rig) -> None:
    async def slowly(backend: Backend, request: Request) -> bytes:
        await asyncio.sleep(0.05)
        return answer(b"done")

    (backend,) = await serve(rig, ("m1", "127.0.3.1"), handler=slowly)
    before_us, began = time.time() * 1e6, time.monotonic()
    response = await rig.get(HOST)
    took_us = (time.monotonic() - began) * 1e6
    assert backend.requests[0].header(ID) == response.headers[ID], "the app has the same id"
    (record,) = await records(rig, response.headers[ID])
    assert (record.role, record.outcome, record.status, record.attempt) == ("edge", "answered", 200, 1)
    assert (record.app, record.machine, record.node, record.region) == ("web", "m1", "n1", "iad")
    assert record.answer_us >= 50_000
    assert record.connect_us > 0
    assert not record.reused
    assert until_head(record) + (record.body_us or 0) <= took_us
    assert before_us - 1e6 <= record.began_us <= time.time() * 1e6 + 1e6


async def test_an_id_is_found_in_either_form_and_others_are_not(rig: Rig) -> None:
    await serve(rig, ("m1", "127.0.3.1"))
    request_id = (await rig.get(HOST)).headers[ID]
    bare = request_id.partition("-")[0]
    assert len(await records(rig, bare)) == len(await records(rig, bare.lower() + "-lhr")) == 1
    assert await records(rig, "0" + bare[1:-1] + ("0" if bare[-1] != "0" else "1")) == []
    assert "26 digits" in (await rig.admin("/trace/nonsense") or "")


async def test_a_kept_connection_costs_no_connect(rig: Rig) -> None:
    await serve(rig, ("m1", "127.0.3.1"))
    found = [(await records(rig, (await rig.get(HOST)).headers[ID]))[0] for _ in range(16)]  # by whichever worker
    kept = [record for record in found if record.reused]
    assert kept
    assert all(record.connect_us == 0 for record in kept)


async def test_each_try_is_told(rig: Rig) -> None:
    backends = await serve(rig, ("m1", "127.0.3.1"), ("m2", "127.0.3.2"))
    await backends[0].stop()
    found: list[TraceRecord] = []
    for _ in range(20):  # until the machine that is gone was chosen first
        found = await records(rig, (await rig.get(HOST)).headers[ID])
        if len(found) == 2:
            break
    failed, answered = found
    assert (failed.machine, failed.outcome, failed.reason, failed.code) == ("m1", "failed", "connect", "PC01")
    assert (answered.machine, answered.outcome, answered.attempt) == ("m2", "answered", 2)
    assert answered.from_us >= until_head(failed)


async def test_a_replay_is_told(rig: Rig) -> None:
    async def send_on(backend: Backend, request: Request) -> bytes:
        if backend.name == "m1":
            return answer(b"", "200 OK", "fly-replay: instance=m2")
        return answer(b"m2")

    await serve(rig, ("m1", "127.0.3.1"), ("m2", "127.0.3.2"), handler=send_on)
    response = await rig.get(HOST, **{"fly-force-instance-id": "m1"})
    assert response.text == "m2"
    first, second = await records(rig, response.headers[ID])
    assert [(one.machine, one.replays, one.attempt) for one in (first, second)] == [("m1", 0, 1), ("m2", 1, 2)]


async def test_what_no_machine_answered_has_its_end(rig: Rig) -> None:
    (backend,) = await serve(rig, ("m1", "127.0.3.1"))
    await backend.stop()
    response = await rig.get(HOST)
    *tries, end = await records(rig, response.headers[ID])
    assert response.status_code == 502
    assert len(tries) >= 2
    assert (end.outcome, end.status, end.code, end.app, end.attempt) == ("refused", 502, "PC01", "web", 0)
    assert end.waited_us["retry"] > 0
    (unknown,) = await records(rig, (await rig.get("nobody.test")).headers[ID])
    assert (unknown.outcome, unknown.status, unknown.app) == ("refused", 404, "")


async def test_an_answer_on_its_way_and_one_that_broke_off(rig: Rig) -> None:
    go_on = asyncio.Event()

    async def halfway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await writer.drain()
        await go_on.wait()
        writer.close()

    port = free_port()
    server = await asyncio.start_server(halfway, "127.0.3.1", port)
    rows = [*app_rows("web", HOST), service_row(rig.ports, "web", port), machine_row("web", "m1", "127.0.3.1")]
    await rig.agent.rows(*rows)
    reader, writer = await asyncio.open_connection(rig.address, rig.ports.http)
    try:
        writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        head = (await asyncio.wait_for(reader.readuntil(b"half"), WITHIN_S)).decode()
        request_id = next(line for line in head.splitlines() if line.startswith(ID)).split(": ")[1]
        (under_way,) = json.loads(await rig.admin(f"/trace/{request_id}") or "")["records"]
        assert under_way["body_us"] is None
        go_on.set()
        (cut,) = await records(rig, request_id)
        assert cut.cut
        (told,) = [frame for frame in await rig.agent.frames_of("ProxyLog") if frame.code == "PU02"]
        assert told.request_id == request_id
    finally:
        writer.close()
        server.close()
        await server.wait_closed()


async def test_the_agent_is_told_the_same(rig: Rig) -> None:
    await serve(rig, ("m1", "127.0.3.1"))
    request_id = (await rig.get(HOST)).headers[ID]
    expected = await records(rig, request_id)
    await rig.agent.send(Trace(id=7, request=request_id))
    (traced,) = await rig.agent.frames_of("Traced")
    assert (traced.id, traced.records) == (7, expected)


async def test_a_proxy_without_room_for_records_says_that_it_keeps_none(tmp_path: Path) -> None:
    async with running(tmp_path, trace_mib_max=0) as rig:
        await serve(rig, ("m1", "127.0.3.1"))
        now_ms = time.time() * 1000
        request_id = (await rig.get(HOST)).headers[ID]
        document = json.loads(await rig.admin(f"/trace/{request_id}") or "")
        assert document["records"] == []
        assert document["since_ms"] >= now_ms - 1


# -- two proxies -------------------------------------------------------------------------------------------------


@pytest.fixture
async def two(tmp_path: Path) -> AsyncGenerator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr") as made:
        yield made


async def both(two: Cluster, request_id: str) -> tuple[list[TraceRecord], list[TraceRecord]]:
    edge, worker = two.hosts
    return await records(edge.rig, request_id), await records(worker.rig, request_id)


async def test_edge_and_worker_tell_of_one_request(two: Cluster) -> None:
    edge, worker = two.hosts

    async def slowly(backend: Backend, request: Request) -> bytes:
        await asyncio.sleep(0.05)
        return answer(b"done")

    await worker.rig.backend("m1", worker.machines, port := free_port(), slowly)
    await two.web(port, two.machine(worker, "m1"))
    response = await edge.rig.get(HOST)
    request_id = response.headers[ID]
    assert request_id.endswith("-iad")
    ((here,), (there,)) = await both(two, request_id)
    assert (here.role, there.role) == ("edge", "worker")
    assert (here.node, here.region, there.node, there.machine) == ("n2", "lhr", "n2", "m1")
    assert 50_000 <= there.answer_us <= until_head(there) <= here.answer_us
    assert here.began_us <= there.began_us, "both clocks are one here"


async def test_a_wake_abroad_is_told_where_it_was_waited_for(two: Cluster) -> None:
    edge, worker = two.hosts
    waker = Waker(worker, port := free_port())
    await two.web(port, two.machine(worker, "m1", "stopped"))
    asking = asyncio.create_task(edge.rig.get(HOST))
    await until(worker.rig.agent_asked_for_a_wake, bool, within_s=WITHIN_S, every_s=0.01)
    waker.ready.set()
    request_id = (await asking).headers[ID]
    ((here,), (there,)) = await both(two, request_id)
    assert here.waited_us == {}
    assert 0 < there.waited_us["cold"] <= there.choose_us <= here.answer_us


async def test_a_host_that_turns_a_request_away_says_so(two: Cluster) -> None:
    edge, worker = two.hosts
    waker = Waker(worker, port := free_port(), code="PM01", reason="the image is gone")
    waker.ready.set()
    await two.web(port, two.machine(worker, "m1", "stopped"))
    request_id = (await edge.rig.get(HOST)).headers[ID]
    ((tried, *_, end), (turned, *_)) = await both(two, request_id)
    assert (tried.outcome, tried.reason, tried.code) == ("turned", "wake", "PM01")
    assert (turned.role, turned.outcome, turned.reason, turned.machine) == ("worker", "turned", "wake", "m1")
    assert (end.outcome, end.status) == ("refused", 503)
    for host in (edge, worker):
        assert request_id in log_of(host), "the log of each host has the id"


def log_of(host: Host) -> str:
    return (host.folder / "proxy.log").read_text()
