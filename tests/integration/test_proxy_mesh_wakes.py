"""A machine that sleeps on another host: the request waits there, and one wake serves all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mesh_rig import HOST, Cluster, Gate, Host, Waker, cluster

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import Wake
from pantala.wire.machine import Concurrency

pytestmark = pytest.mark.anyio


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr", "nrt", wake_timeout_ms=8_000, queue_timeout_ms=4_000) as made:
        yield made


def wakes_of(host: Host) -> list[Wake]:
    return [frame for frame in host.rig.agent.frames if isinstance(frame, Wake)]


async def served(host: Host, number: int) -> None:
    async def count() -> float:
        return await host.metric("pantala_proxy_mesh_served_total")

    await until(count, lambda now: now >= number, within_s=10, every_s=0.02)


async def test_one_wake_for_the_requests_of_all_edges(three: Cluster) -> None:
    home = three.hosts[2]
    waker = Waker(home, port := free_port())
    limits = Concurrency(type="requests", soft_limit=20, hard_limit=40)
    sleepers = [three.machine(home, name, "stopped") for name in ("m1", "m2")]
    await three.web(port, *sleepers, concurrency=limits)
    requests = [asyncio.create_task(host.rig.get(HOST)) for host in three.hosts[:2] for _ in range(15)]
    await served(home, 30)
    waker.ready.set()
    answers = await asyncio.gather(*requests)
    assert [(response.status_code, response.text) for response in answers] == [(200, "m1")] * 30
    assert [wake.machine for wake in wakes_of(home)] == ["m1"], "the other sleeps on"
    assert not wakes_of(three.hosts[0]), "the edge asks no agent of its own"


async def test_more_than_the_woken_machine_takes_wait_in_line_there(three: Cluster) -> None:
    """Its row still says that it sleeps."""
    home = three.hosts[2]
    gate = Gate()
    waker = Waker(home, port := free_port(), gate)
    limits = Concurrency(type="requests", soft_limit=2, hard_limit=2)
    await three.web(port, three.machine(home, "m1", "stopped"), concurrency=limits)
    requests = [asyncio.create_task(host.rig.get(HOST)) for host in three.hosts[:2] for _ in range(3)]
    await served(home, 6)
    waker.ready.set()

    async def queued() -> float:
        return await home.metric("pantala_proxy_queue_length")

    await until(queued, lambda length: length == 4, within_s=10, every_s=0.02)
    gate.open.set()
    answers = await asyncio.gather(*requests)
    assert [(response.status_code, response.text) for response in answers] == [(200, "m1")] * 6


async def test_a_sleeper_at_home_is_woken_before_a_running_one_abroad(three: Cluster) -> None:
    here, _, far = three.hosts
    waker = Waker(here, port := free_port())
    await far.rig.backend("far", far.machines, port)
    await three.web(port, three.machine(here, "near", "stopped"), three.machine(far, "far"))
    waker.ready.set()
    assert (await here.rig.get(HOST)).text == "near"
    assert await far.metric("pantala_proxy_mesh_served_total") == 0


async def test_a_wake_that_fails_leaves_the_request_to_another_region(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "iad", "nrt") as made:
        here, neighbour, far = made.hosts
        waker = Waker(neighbour, port := free_port(), code="PM07", reason="the image is gone", elsewhere=True)
        waker.ready.set()
        await far.rig.backend("far", far.machines, port)
        await made.web(port, made.machine(neighbour, "near", "stopped"), made.machine(far, "far"))
        for _ in range(3):
            assert (await here.rig.get(HOST)).text == "far"
        assert len(wakes_of(neighbour)) == 1, "not asked again at once"


async def test_why_a_wake_abroad_failed_is_told(three: Cluster) -> None:
    here, home, _ = three.hosts
    waker = Waker(home, port := free_port(), code="PM01", reason="the image is gone")
    waker.ready.set()
    await three.web(port, three.machine(home, "m1", "stopped"))
    response = await here.rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (503, "PM01")
    assert response.json()["error"] == "The machine could not be started: the image is gone."


async def test_an_edge_that_has_not_heard_of_a_stop_wakes_only_if_nobody_else_serves(three: Cluster) -> None:
    here, one, two = three.hosts
    waker = Waker(one, port := free_port())
    waker.ready.set()
    await two.rig.backend("two", two.machines, port)
    await three.web(port, three.machine(one, "m1"), three.machine(two, "m2"))
    await one.rig.agent.rows(three.machine(one, "m1", "stopped"))
    prefer = {"fly-prefer-region": "lhr"}
    assert (await here.rig.get(HOST, **prefer)).text == "two"
    assert not wakes_of(one)
    assert await one.metric('pantala_proxy_mesh_refused_total{reason="asleep"}') == 1
    await three.rows(three.machine(two, "m2", "failed"))
    await one.rig.agent.rows(three.machine(one, "m1", "stopped"))
    assert (await here.rig.get(HOST, **prefer)).text == "m1"
    assert len(wakes_of(one)) == 1
