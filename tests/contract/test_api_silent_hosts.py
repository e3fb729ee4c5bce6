"""A host that stands still or is cut off while machines are created: callers are answered soon, and nothing of what it
missed happens there later."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from pantala.client.node import subject as subject_of
from pantala.control.machines import CREATE_WITHIN_S
from pantala.control.nodes import AVOIDED_S
from pantala.errors import NodeUnreachable
from pantala.testing.bus import MemoryBus
from pantala.testing.faults import FastClock
from pantala.testing.platform import TestPlatform, running
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

MACHINES = "/v1/apps/web/machines"
_REQUEST = msgspec.json.Decoder(wire.NodeRequest)


class Buffering(MemoryBus):
    """What is for node-1 stays on its way, as in the socket of a process that was stopped. `lets_through`: its other
    calls."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FastClock()
        self.stops: tuple[type, ...] = ()
        self.kept: list[wire.NodeRequest] = []
        self.payloads: list[bytes] = []

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        if subject == subject_of("node-1") and isinstance(request := _REQUEST.decode(payload), self.stops):
            self.kept.append(request)
            self.payloads.append(payload)
            self.clock.advance(timeout_s)
            raise NodeUnreachable("no answer")
        return await super().request(subject, payload, timeout_s=timeout_s)


@pytest.fixture
def bus() -> Buffering:
    return Buffering()


@pytest.fixture
async def web(bus: Buffering, tmp_path: Path) -> AsyncGenerator[TestPlatform]:
    async with running(tmp_path, clock=bus.clock, bus=bus) as platform:
        await platform.create_app("web")
        yield platform


def stop(platform: TestPlatform, bus: Buffering) -> Callable[[], None]:
    """Node-1 was heard until now; from its next call on it stands still, until it goes on by what this gives."""
    agent = platform.agents["node-1"]
    bus.stops = (wire.CreateMachine,)

    heard_at = platform.sightings.heard_at
    stopped_at = bus.clock.monotonic()
    platform.sightings.heard_at = lambda node_id: stopped_at if node_id == agent.node else heard_at(node_id)

    def go_on() -> None:
        platform.sightings.heard_at = heard_at
        bus.stops = ()

    return go_on


async def create(platform: TestPlatform, **guest: Any) -> httpx2.Response:
    config = {"image": "registry.pantala.test/web:v1", "guest": {"cpu_kind": "shared", "cpus": 1, **guest}}
    return await platform.http.post(MACHINES, json={"config": config, "region": "iad"}, headers=platform.auth)


async def test_another_host_is_asked_soon(web: TestPlatform, bus: Buffering) -> None:
    stop(web, bus)
    await web.add_agent("node-2")
    web.agents["node-2"].memory_mib = 512  # the first choice is the other one
    web.sightings.tell("node-2")
    begun = bus.clock.monotonic()
    made = await create(web, memory_mb=256)
    assert (made.status_code, made.json()["node"]) == (200, "node-2")
    assert 0 < bus.clock.monotonic() - begun <= CREATE_WITHIN_S / 2
    listed = (await web.http.get(MACHINES, headers=web.auth)).json()
    assert [machine["id"] for machine in listed] == [made.json()["id"]]


async def test_the_next_ones_go_elsewhere_at_once(web: TestPlatform, bus: Buffering) -> None:
    stop(web, bus)
    assert (await create(web)).status_code == 500
    asked, begun = len(bus.kept), bus.clock.monotonic()
    await web.add_agent("node-2")
    for _ in range(3):
        assert (await create(web)).json()["node"] == "node-2"
    assert (len(bus.kept), bus.clock.monotonic()) == (asked, begun)


async def test_with_no_other_host_the_caller_is_told_which_one_and_when_to_ask_again(
    web: TestPlatform, bus: Buffering
) -> None:
    stop(web, bus)
    begun = bus.clock.monotonic()
    refused = await create(web)
    assert bus.clock.monotonic() - begun <= CREATE_WITHIN_S + 1
    assert (refused.status_code, refused.json()["status"]) == (500, "unavailable")
    assert refused.json()["error"] == "the host node-1 does not answer; nothing was created"
    assert int(refused.headers["retry-after"]) == 5
    assert (await web.http.get(MACHINES, headers=web.auth)).json() == []


@pytest.mark.parametrize("ahead_s", [0, 3600, -3600], ids=["right clock", "clock ahead", "clock behind"])
async def test_what_a_host_missed_does_not_begin_when_it_goes_on(
    web: TestPlatform, bus: Buffering, ahead_s: int
) -> None:
    agent = web.agents["node-1"]
    agent.clock_ahead_ms = ahead_s * 1000
    go_on = stop(web, bus)
    await web.add_agent("node-2")
    assert (await create(web)).json()["node"] == "node-2"
    assert bus.payloads
    bus.clock.advance(0.5)
    for payload in bus.payloads:
        reply = msgspec.json.decode(await agent.handle(subject_of("node-1"), payload) or b"", type=wire.NodeReply)
        assert reply.error is not None
        assert reply.error.kind == "NodeUnreachable"
    assert agent.machines == {}
    go_on()
    bus.clock.advance(AVOIDED_S)
    assert (await create(web)).json()["node"] == "node-1"


async def test_a_host_that_is_heard_but_slow_is_asked_again(web: TestPlatform, bus: Buffering) -> None:
    bus.stops = (wire.CreateMachine,)
    begun = bus.clock.monotonic()
    refused = await create(web)
    assert refused.status_code == 500
    assert bus.clock.monotonic() - begun <= CREATE_WITHIN_S + 1
    assert len(bus.kept) == 2
    assert len({request.request_id for request in bus.kept if isinstance(request, wire.CreateMachine)}) == 1


async def test_a_host_that_does_not_say_what_it_has_is_not_asked_by_everyone(web: TestPlatform, bus: Buffering) -> None:
    bus.stops = (wire.GetNode,)
    web.agents["node-1"].memory_mib = 1024
    web.sightings.tell("node-1")
    answers: list[int] = []

    async def ask() -> None:
        answers.append((await create(web, memory_mb=2048)).status_code)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(ask)
    assert answers == [422] * 20
    assert len(bus.kept) == 1


async def test_what_a_host_said_of_its_room_is_kept_while_it_says_nothing_new(
    web: TestPlatform, bus: Buffering
) -> None:
    agent = web.agents["node-1"]
    agent.memory_mib = 512
    web.sightings.tell("node-1")
    web.sightings.freeze("node-1")
    assert (await create(web, memory_mb=512)).status_code == 200
    agent.memory_mib = 2048
    assert (await create(web, memory_mb=512)).status_code == 200  # it was asked
    bus.stops = (wire.GetNode,)
    bus.clock.advance(1)
    assert (await create(web, memory_mb=2048)).status_code == 422
    assert len(bus.kept) == 1
    assert (await create(web, memory_mb=512)).status_code == 200
