"""Proxy to proxy: a request enters at one host and is served by a machine of another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mesh_rig import (
    HOST,
    Cluster,
    Gate,
    Reader,
    cluster,
    distance,
    echo_chunks,
    echo_tcp,
    node_row,
    talk,
)
from proxy_rig import Backend, Request, answer, row, service_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import Drain, Listener, ServiceRow
from pantala.wire.machine import Concurrency, Port

pytestmark = pytest.mark.anyio
WORKERS = os.cpu_count() or 1


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr", wake_timeout_ms=10_000, queue_timeout_ms=3_000) as made:
        yield made


# -- one hop -----------------------------------------------------------------------------------------------------


async def test_served_by_a_machine_of_another_host(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()
    backend = await there.rig.backend("one", there.machines, port)
    await pair.web(port, pair.machine(there, "m1"))
    response = await here.rig.get(HOST, "/where?x=1", via="1.1 somewhere", **{"pantala-mesh-hops": "9"})
    assert (response.status_code, response.text) == (200, "one")
    assert not [name for name in response.headers if name.startswith("pantala-")]
    request = backend.requests[-1]
    assert request.path == "/where?x=1"
    assert request.header("fly-region") == "iad", "the edge's region, not the machine's"
    assert request.header("fly-client-ip") == "127.0.0.1"
    assert request.header("host") == f"{HOST}:{pair.ports.http}"
    assert [value for name, value in request.headers if name == "via"] == ["1.1 somewhere", "1.1 fly.io"]
    assert not [name for name, _ in request.headers if name.startswith("pantala-")]
    assert await here.metric("pantala_proxy_mesh_requests_total") == 1
    assert await there.metric("pantala_proxy_mesh_served_total") == 1
    assert await there.metric("pantala_proxy_requests_total") == 0, "it did not enter there"


async def test_connections_between_hosts_are_kept(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()
    await there.rig.backend("one", there.machines, port)
    await pair.web(port, pair.machine(there, "m1"))
    answers = await asyncio.gather(*(here.rig.get(HOST) for _ in range(60)))
    answers += [await here.rig.get(HOST) for _ in range(60)]
    assert [response.status_code for response in answers] == [200] * 120
    # one for pings, one for each worker thread of the edge
    assert await there.metric("pantala_proxy_mesh_handshakes_total") <= 1 + WORKERS
    assert await here.metric("pantala_proxy_mesh_connections_failed_total") == 0


async def test_bodies_stream_both_ways_with_trailers(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()
    async with await asyncio.start_server(echo_chunks, there.machines, port):
        await pair.web(port, pair.machine(there, "m1"))
        async with talk(here.address, pair.ports.http) as client:
            head = ["POST / HTTP/1.1", f"Host: {HOST}", "Transfer-Encoding: chunked", "TE: trailers"]
            await client.say("\r\n".join(head).encode() + b"\r\n\r\n")
            for index in range(5):  # each comes back before the next is sent
                await client.say(b"5\r\nping%d\r\n" % index)
                if index == 0:
                    assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                await client.until(b"ping%d" % index)
            await client.say(b"0\r\n\r\n")
            assert b"x-sum: 25" in await client.until(b"\r\n\r\n")


async def test_a_client_that_does_not_read_slows_the_app_down(pair: Cluster) -> None:
    here, there = pair.hosts
    port, written = free_port(), 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                writer.write(bytes(65536))
                await writer.drain()
                written += 65536
        except ConnectionError:
            writer.close()

    async with await asyncio.start_server(flood, there.machines, port):
        await pair.web(port, pair.machine(there, "m1"))
        async with talk(here.address, pair.ports.http, limit=65536) as client:
            await client.say(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            await client.until(b"\r\n\r\n")

            async def settled() -> bool:
                before = written
                await asyncio.sleep(0.3)
                return written == before

            await until(settled, bool, within_s=15, every_s=0.01)
            assert written < 64 << 20
            # the mesh connection is not blocked by it
            other = await there.rig.backend("two", "127.0.3.200", port)
            await pair.rows(pair.machine(there, "m1", "stopped"), pair.machine(there, "m2", ip4=other.ip))
            assert (await here.rig.get(HOST)).text == "two"


async def test_clients_that_go_away_give_their_slots_back_and_hurt_nobody(pair: Cluster) -> None:
    here, there = pair.hosts
    gate, port = Gate(), free_port()
    await there.rig.backend("one", there.machines, port, gate)
    limits = Concurrency(type="requests", soft_limit=101, hard_limit=101)
    await pair.web(port, pair.machine(there, "m1"), concurrency=limits)
    patient = asyncio.create_task(here.rig.get(HOST))
    await gate.wait_for(1)
    leaving = [asyncio.create_task(here.rig.get(HOST)) for _ in range(100)]
    await gate.wait_for(101)
    for one in leaving:
        one.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)

    async def in_flight() -> int:
        frames = await there.rig.agent.frames_of("Load")
        return sum(load.in_flight for load in frames[-1].machines)

    await until(in_flight, lambda now: now == 1, within_s=10, every_s=0.05)
    gate.open.set()
    assert (await patient).text == "one"


async def test_large_bodies_arrive_whole(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()

    async def size(backend: Backend, request: Request) -> bytes:
        return answer(f"{len(request.body)} {sum(request.body) % 251}".encode())

    await there.rig.backend("one", there.machines, port, size)
    await pair.web(port, pair.machine(there, "m1"))
    body = bytes(range(251)) * 40_000
    async with here.rig.client(HOST) as client:
        response = await client.post(f"http://{here.address}:{pair.ports.http}/", content=body)
    assert response.text == f"{len(body)} {sum(body) % 251}"


async def test_a_websocket_and_its_end_by_a_drain(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()
    backend = await there.rig.backend("one", there.machines, port)
    await pair.web(port, pair.machine(there, "m1"))
    async with talk(here.address, pair.ports.http) as client:
        await upgrade(client)
        assert backend.requests[-1].header("upgrade") == "websocket"
        for size in (5, 70_000):
            payload = bytes(index % 256 for index in range(size))
            frame = bytes([0x82, size]) if size < 126 else bytes([0x82, 127]) + size.to_bytes(8, "big")
            await client.say(frame + payload)
            assert (await client.exactly(len(frame) + size))[len(frame) :] == payload
        await there.rig.agent.send(Drain(id=1, machine="m1", deadline_ms=50))
        assert await client.exactly(4) == b"\x88\x02\x03\xe9", "going away, between two frames"
        assert await client.rest() == b""
    drained = await there.rig.agent.frames_of("Drained")
    assert drained[-1].result == "deadline"


async def upgrade(client: Reader) -> None:
    lines = ["GET /chat HTTP/1.1", f"Host: {HOST}", "Connection: Upgrade", "Upgrade: websocket"]
    await client.say("\r\n".join(lines).encode() + b"\r\n\r\n")
    head = await client.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101")
    assert b"upgrade: websocket" in head.lower()


async def test_an_upgrade_that_the_app_refuses(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"not for you", "403 Forbidden", "X-Why: rules"))
        writer.close()

    async with await asyncio.start_server(refuse, there.machines, port):
        await pair.web(port, pair.machine(there, "m1"))
        response = await here.rig.get(HOST, "/chat", connection="Upgrade", upgrade="websocket")
        assert (response.status_code, response.text, response.headers["x-why"]) == (403, "not for you", "rules")


async def test_tcp_without_http(tmp_path: Path) -> None:
    raw = free_port()
    listeners = [Listener(address=f"127.0.1.{number}", port=raw, tls=False, http=False) for number in (1, 2)]
    async with cluster(tmp_path, "iad", "lhr", each=[{"more_listeners": [one]} for one in listeners]) as made:
        here, there = made.hosts
        port = free_port()
        async with await asyncio.start_server(echo_tcp, there.machines, port):
            service = ServiceRow(
                app="web", protocol="tcp", internal_port=port, ports=[Port(port=raw)], concurrency=Concurrency()
            )
            await made.web(port, made.machine(there, "m1"))
            address = row("routes", f"addr/{here.address}", {"kind": "dedicated", "app": "web"})
            await made.rows(row("routes", "svc/web/d1", service), address)
            async with talk(here.address, raw) as client:
                for size in (10, 300_000):
                    await client.say(bytes(size))
                    assert await client.exactly(size) == bytes(size)
                client.close_writing()
                assert await client.rest() == b"bye"
        assert await there.metric("pantala_proxy_mesh_served_total") == 1


# -- choosing ----------------------------------------------------------------------------------------------------


async def test_each_edge_serves_from_its_own_region(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr", "nrt") as made:
        port = free_port()
        for host in made.hosts:
            await host.rig.backend(host.region, host.machines, port)
        rows = [made.machine(host, f"m-{host.region}") for host in made.hosts]
        await made.web(port, *rows)
        for host in made.hosts:
            answers = await asyncio.gather(*(host.rig.get(HOST) for _ in range(20)))
            assert {response.text for response in answers} == {host.region}
        here = made.hosts[0]
        for name, value in (
            ("fly-prefer-region", "nrt"),
            ("fly-force-region", "nrt"),
            ("fly-force-instance-id", "m-nrt"),
        ):
            assert (await here.rig.get(HOST, **{name: value})).text == "nrt", name
        assert (await here.rig.get(HOST, **{"fly-prefer-instance-id": "m-lhr"})).text == "lhr"
        # unhealthy at home: another region serves
        await made.rows(made.machine(here, "m-iad", passing=[False]))
        assert (await here.rig.get(HOST)).text in {"lhr", "nrt"}
        peers = await here.peers()
        assert set(peers) == {"n2", "n3"}
        assert all(peer["rtt_us"] > 0 for peer in peers.values())
        assert "pantala_proxy_mesh_peer_rtt_seconds" in (await here.rig.admin("/metrics") or "")


async def test_the_nearest_region_by_measured_round_trip(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr", "nrt") as made:
        edge, far, near = made.hosts
        gate, port = Gate(), free_port()
        gate.open.set()
        for host in (far, near):
            await host.rig.backend(host.region, host.machines, port, gate)
        limits = Concurrency(type="requests", soft_limit=2, hard_limit=4)
        machines = [made.machine(host, f"m-{host.region}") for host in (far, near)]
        await made.web(port, *machines, concurrency=limits)
        async with distance(far, "127.0.6.2", 0.200) as to_far, distance(near, "127.0.6.3", 0.020) as to_near:
            await edge.rig.agent.rows(node_row("n2", "lhr", to_far), node_row("n3", "nrt", to_near))

            def measured(peers: dict[str, Any]) -> bool:
                there, here = (peers[node]["rtt_us"] or 0 for node in ("n2", "n3"))
                return there >= 200_000 and 20_000 <= here < there  # a busy machine adds to both

            await until(edge.peers, measured, within_s=10, every_s=0.05)
            for _ in range(10):
                answers = await asyncio.gather(*(edge.rig.get(HOST) for _ in range(3)))
                assert [response.text for response in answers] == ["nrt"] * 3, "soft limits move nothing"
            gate.open.clear()
            requests = [asyncio.create_task(edge.rig.get(HOST)) for _ in range(8)]
            await gate.wait_for(8)
            gate.open.set()
            answers = await asyncio.gather(*requests)
            assert sorted(response.text for response in answers) == ["lhr"] * 4 + ["nrt"] * 4
            # at home the road is shorter than any
            assert {(await far.rig.get(HOST)).text for _ in range(5)} == {"lhr"}


async def test_never_above_the_hard_limit_however_many_edges(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr", "nrt", queue_timeout_ms=15_000) as made:
        port = free_port()

        async def slowly(backend: Backend, request: Request) -> bytes:
            await asyncio.sleep(0.01)
            return answer(b"done")

        home = made.hosts[2]
        backend = await home.rig.backend("one", home.machines, port, slowly)
        limits = Concurrency(type="requests", soft_limit=2, hard_limit=4)
        await made.web(port, made.machine(home, "m1"), concurrency=limits)
        answers = await asyncio.gather(*(host.rig.get(HOST) for host in made.hosts for _ in range(50)))
        assert [response.status_code for response in answers] == [200] * 150
        assert backend.busy_max == 4, "as much as allowed, never more"


async def test_refused_by_one_host_served_by_the_next(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr", "nrt") as made:
        edge, one, two = made.hosts
        gate, port = Gate(), free_port()
        await one.rig.backend("one", one.machines, port, gate)
        second = await two.rig.backend("two", two.machines, port)
        limits = Concurrency(type="requests", soft_limit=1, hard_limit=1)
        await made.web(port, made.machine(one, "m1"), made.machine(two, "m2"), concurrency=limits)
        prefer = {"fly-prefer-region": "lhr"}
        held = asyncio.create_task(one.rig.get(HOST, **prefer))
        await gate.wait_for(1)
        # the edge has not heard that m1 is full
        response = await edge.rig.get(HOST, **prefer)
        assert (response.status_code, response.text) == (200, "two"), response.text
        assert await one.metric('pantala_proxy_mesh_refused_total{reason="full"}') == 1
        gate.open.set()
        assert (await held).text == "one"
        # a drain that no row tells of
        await one.rig.agent.send(Drain(id=1, machine="m1", deadline_ms=10_000))
        await one.rig.agent.frames_of("Drained")
        await edge.forgets_load()
        assert (await edge.rig.get(HOST, **prefer)).text == "two"
        assert await one.metric('pantala_proxy_mesh_refused_total{reason="draining"}') >= 1
        # cordoned and unknown, in the worker's view alone
        await one.rig.agent.rows(made.machine(one, "m1", instance_id="01B", cordoned=True))
        assert (await edge.rig.get(HOST, **prefer)).text == "two"
        assert await one.metric('pantala_proxy_mesh_refused_total{reason="cordoned"}') >= 1
        await one.rig.agent.rows(row("routes", "m/m1", None))
        assert (await edge.rig.get(HOST, **prefer)).text == "two"
        assert await one.metric('pantala_proxy_mesh_refused_total{reason="unknown"}') >= 1
        # an app that does not listen yet: a byte never reached it, so even a POST goes on
        await one.rig.agent.rows(made.machine(one, "m1", ip4="127.0.3.250"))
        async with edge.rig.client(HOST) as client:
            url = f"http://{edge.address}:{made.ports.http}/"
            response = await client.post(url, content=b"once", headers=prefer)
        assert (response.text, second.requests[-1].body) == ("two", b"once")


async def test_the_last_attempt_may_queue(pair: Cluster) -> None:
    here, there = pair.hosts
    gate, port = Gate(), free_port()
    await there.rig.backend("one", there.machines, port, gate)
    limits = Concurrency(type="requests", soft_limit=1, hard_limit=1)
    await pair.web(port, pair.machine(there, "m1"), concurrency=limits)
    held = asyncio.create_task(there.rig.get(HOST))
    await gate.wait_for(1)
    waiting = [asyncio.create_task(here.rig.get(HOST, f"/{index}")) for index in range(3)]

    async def queued() -> float:
        return await there.metric("pantala_proxy_queue_length")

    await until(queued, lambda length: length == 3, within_s=3, every_s=0.02)
    gate.open.set()
    assert (await held).status_code == 200
    assert [(await one).status_code for one in waiting] == [200] * 3
    # a queue has an end: its deadline is the worker's, the page the edge's
    gate.open.clear()
    held = asyncio.create_task(there.rig.get(HOST))
    await gate.wait_for(1)
    response = await here.rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (503, "PR04")
    gate.open.set()
    await held


async def test_the_fleet_of_two_hosts_is_used_up_before_anything_queues(pair: Cluster) -> None:
    here, there = pair.hosts
    gate, port = Gate(), free_port()
    for host in pair.hosts:
        await host.rig.backend(host.region, host.machines, port, gate)
    limits = Concurrency(type="requests", soft_limit=3, hard_limit=3)
    await pair.web(port, *(pair.machine(host, f"m-{host.region}") for host in pair.hosts), concurrency=limits)
    requests = [asyncio.create_task(here.rig.get(HOST)) for _ in range(6)]
    await gate.wait_for(6)
    gate.open.set()
    assert sorted([(await one).text for one in requests]) == ["iad"] * 3 + ["lhr"] * 3
    assert await there.metric("pantala_proxy_mesh_served_total") == 3


async def test_services_are_told_apart_by_their_port(pair: Cluster) -> None:
    here, there = pair.hosts
    one, two = free_port(), free_port()
    await there.rig.backend("one", there.machines, one)
    await there.rig.backend("two", there.machines, two)
    await pair.web(one, pair.machine(there, "m1", services=["d1", "d2"], passing=[True, True]))
    plain = [Port(port=pair.ports.http, handlers=["http"])]
    secure = [Port(port=pair.ports.https, handlers=["tls", "http"])]
    await pair.rows(service_row(pair.ports, "web", one, ports=plain))
    second = service_row(pair.ports, "web", two, ports=secure)
    await pair.rows(
        row("routes", "svc/web/d2", None), type(second)(stream="routes", key="svc/web/d2", value=second.value)
    )
    await pair.rows(row("certs", "cert/web", here.rig.ca.issue(HOST)))
    assert (await here.rig.get(HOST)).text == "one"
    async with here.rig.client(HOST, http2=True) as client:
        client.headers["host"] = HOST
        response = await client.get("/", extensions={"sni_hostname": HOST})
    assert response.text == "two"
