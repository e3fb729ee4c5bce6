"""Replays over several hosts: the edge that the client is connected to sends the request on, whoever said so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mesh_rig import HOST, Cluster, cluster, talk
from proxy_rig import Backend, Request, answer
from replays import fields, once, replay, replay_json

from pantala.testing.ports import free_port

pytestmark = pytest.mark.anyio


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr", "nrt", wake_timeout_ms=5_000, queue_timeout_ms=2_000) as made:
        yield made


async def test_a_write_goes_to_the_region_that_its_first_machine_names(three: Cluster) -> None:
    """The client is in lhr, whose machine says: writes go to nrt. The machine in nrt sees where it came from."""
    _, edge, far = three.hosts
    port = free_port()

    async def echo(backend: Backend, request: Request) -> bytes:
        return answer(backend.name.encode() + b" " + request.body)

    await edge.rig.backend("near", edge.machines, port, once(replay("region=nrt;state=write")))
    target = await far.rig.backend("far", far.machines, port, echo)
    await three.web(port, three.machine(edge, "m2"), three.machine(far, "m3"))
    body = "x" * 200_000
    async with talk(edge.address, three.ports.http) as client:
        head = f"POST /w HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        await client.say(head.encode() + body.encode())
        assert (await client.rest()).endswith(b"\r\n\r\nfar " + body.encode())
    request = target.requests[-1]
    source = fields(request.header("fly-replay-src"))
    assert (source["instance"], source["region"], source["state"]) == ("m2", "lhr", "write")
    assert request.header("fly-region") == "lhr", "the edge is where the client is"


@pytest.mark.parametrize("form", ["header", "json"])
async def test_who_says_so_is_behind_the_mesh(three: Cluster, form: str) -> None:
    edge, issuer, target = three.hosts
    port = free_port()
    said = replay("instance=m3") if form == "header" else replay_json(instance="m3")
    await issuer.rig.backend("one", issuer.machines, port, once(said))
    await target.rig.backend("two", target.machines, port)
    await three.web(port, three.machine(issuer, "m2"), three.machine(target, "m3"))
    for _ in range(5):
        response = await edge.rig.get(HOST, **{"fly-prefer-instance-id": "m2"})
        assert (response.status_code, response.text) == (200, "two")
        assert not [name for name in response.headers if name.startswith(("fly-replay", "pantala-"))]
    assert await edge.metric("pantala_proxy_replays_total") == 5
    assert await issuer.metric("pantala_proxy_replays_total") == 0, "its host only passes the answer on"
    # what the issuer held is free again
    loads = (await issuer.rig.agent.frames_of("Load", bool))[-1].machines
    assert sum(load.in_flight for load in loads) == 0


async def test_elsewhere_leaves_the_host_that_said_it(three: Cluster) -> None:
    edge, issuer, target = three.hosts
    port = free_port()
    for host in (issuer, target):
        await host.rig.backend(host.node, host.machines, port, once(replay("elsewhere=true")))
    await three.web(port, three.machine(issuer, "m2"), three.machine(target, "m3"))
    for machine, served in (("m2", "n3"), ("m3", "n2")):
        assert (await edge.rig.get(HOST, **{"fly-prefer-instance-id": machine})).text == served


async def test_a_silent_target_and_back_across_the_mesh(three: Cluster) -> None:
    edge, issuer, target = three.hosts
    port, release = free_port(), asyncio.Event()

    async def hang(backend: Backend, request: Request) -> bytes:
        await release.wait()
        return answer(b"late")

    said = replay("instance=m3;timeout=300ms;fallback=force_self")
    asking = await issuer.rig.backend("one", issuer.machines, port, once(said))
    await target.rig.backend("two", target.machines, port, hang)
    await three.web(port, three.machine(issuer, "m2"), three.machine(target, "m3"))
    assert (await edge.rig.get(HOST, **{"fly-prefer-instance-id": "m2"})).text == "one"
    failure = fields(asking.requests[-1].header("fly-replay-failed"))
    assert (failure["reason"], failure["replay_source"], failure["instance"]) == ("timeout", "m2", "m3")
    assert int(failure["elapsed_ms"]) >= 300
    release.set()


async def test_an_upgrade_goes_on_from_one_host_to_another(three: Cluster) -> None:
    edge, issuer, target = three.hosts
    port = free_port()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(replay("instance=m3"))
        await writer.drain()
        writer.close()

    sockets = await target.rig.backend("two", target.machines, port)
    async with await asyncio.start_server(refuse, issuer.machines, port):
        await three.web(port, three.machine(issuer, "m2"), three.machine(target, "m3"))
        async with talk(edge.address, three.ports.http) as client:
            head = f"GET /ws HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            await client.say(head.encode() + b"Fly-Prefer-Instance-Id: m2\r\n\r\n")
            assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            await client.say(b"ping")
            assert await client.exactly(4) == b"ping"
    assert fields(sockets.requests[-1].header("fly-replay-src"))["instance"] == "m2"
