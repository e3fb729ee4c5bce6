"""A new version is asked over HTTP until it has answered once; for a while it gets no requests before that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from pantala.agent.prober import SocketProber
from pantala.agent.wakes import Wakes
from pantala.testing.agent import FAST, RunningAgent, World, config, service
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.machine import Check, HTTPOptions, Machine, MachineConfig, Port

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"
HTTP = Port(port=443, handlers=["tls", "http"])


def web(**changes: Any) -> MachineConfig:
    return config(services=[service(ports=[HTTP], **changes)])


def answers(machine: Machine) -> list[str]:
    return [
        event.request.reason or ""
        for event in machine.events
        if (event.type, event.status) == ("answer", "answered") and event.request
    ]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("status", [200, 404, 500])
async def test_any_status_is_an_answer_and_a_version_is_asked_once(world: World, status: int) -> None:
    world.prober.http_status = status
    async with world.agent() as agent:
        await agent.create(config=web())
        machine = await agent.until(lambda m: bool(answers(m)))
        assert answers(machine) == [f"GET / was answered with {status} on port 8080"]
        for _ in range(2):
            await agent.do(node.StopMachine)
            await agent.wait("stopped")
            await agent.do(node.StartMachine)
            await agent.until(lambda m: m.events[0].type == "ready")
        assert world.prober.asked == [8080]
    async with world.agent() as agent:
        await agent.until(lambda m: m.events[0].type == "ready")
        assert world.prober.asked == [8080]
        await agent.do(node.UpdateMachine, config=web(), image=machine.image_ref)
        await agent.until(lambda m: len(answers(m)) == 2)
        assert world.prober.asked == [8080, 8080]


async def test_one_that_does_not_answer_is_ready_gets_requests_and_is_asked_again(world: World) -> None:
    world.prober.http_status = 0
    async with world.agent() as agent:
        await agent.create(config=web())
        await agent.until(lambda _: len(world.prober.asked) > 2)
        machine = await agent.until(lambda m: "ready" in {event.type for event in m.events})
        assert not answers(machine)
        await until(passing(world), lambda flags: flags == [True], within_s=15, every_s=0.005)
    async with world.agent() as agent:  # another agent goes on asking
        world.prober.http_status = 503
        await agent.until(lambda m: bool(answers(m)))


async def test_a_new_version_gets_no_request_before_it_has_answered(tmp_path: Path) -> None:
    world = World(tmp_path, pace=replace(FAST, held_s=3600.0))
    world.prober.http_status = 0
    async with world.agent() as agent:
        await agent.create(config=web())
        # Its port accepts, and that is written down beside the questions.
        await agent.until(lambda m: "ready" in {event.type for event in m.events} and len(world.prober.asked) > 2)
        assert await passing(world)() == [False]
        world.prober.http_status = 404
        await until(passing(world), lambda flags: flags == [True], within_s=15, every_s=0.005)


def passing(world: World) -> Callable[[], Awaitable[object]]:
    async def look() -> object:
        return world.rows.rows["routes", f"m/{ID}"]["passing"]

    return look


async def test_asking_has_an_end(tmp_path: Path) -> None:
    world = World(tmp_path, pace=replace(FAST, answer_end_s=0.0))
    world.prober.http_status = 0
    async with world.agent() as agent:
        await agent.create(config=web())
        await agent.until(lambda _: bool(world.prober.asked))
        await until(lambda: asking(agent), lambda still: not still, within_s=15, every_s=0.005)
        assert world.prober.asked == [8080]


async def asking(agent: RunningAgent) -> bool:
    health = agent.host.machines[ID].keeper.health
    return health is not None and health.is_asking


@pytest.mark.parametrize(
    "quiet",
    [
        config(),
        config(services=[service(ports=[Port(port=5432, handlers=["tls"])])]),
        web(checks=[Check(type="tcp", interval="500ms")]),
        config(
            services=[service(ports=[Port(port=443, handlers=["http"], http_options=HTTPOptions(h2_backend=True))])]
        ),
    ],
    ids=["no port", "raw tcp", "checked", "h2"],
)
async def test_only_http_without_checks_is_asked(world: World, quiet: MachineConfig) -> None:
    async with world.agent() as agent:
        await agent.create(config=quiet)
        await agent.until(lambda m: m.events[0].type == "ready")
        assert not await asking(agent)
        assert world.prober.asked == []


async def test_a_wake_waits_for_no_answer(world: World) -> None:
    world.prober.http_status = 0
    async with world.agent() as agent:
        await agent.create(config=web(), skip_launch=True)
        await agent.wait("stopped")
        assert (await Wakes(agent.host).wake(ID, 5)).ok


# -- over sockets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"HTTP/1.1 500 Oops\r\n", 500),
        (b"HTTP/1.0 200 OK\r\n\r\n", 200),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 0),
        (b"", 0),
    ],
    ids=["a head that goes on", "old", "another protocol", "closed"],
)
async def test_the_status_line_is_enough(said: bytes, status: int) -> None:
    """The rest may come later or never, as with a stream of events."""
    over = anyio.Event()
    asked: list[bytes] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive())
            if said:
                await stream.send(said)
                await over.wait()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        assert await SocketProber().answer("127.0.0.1", port, timeout_s=10) == status
        assert asked[0].startswith(b"GET / HTTP/1.1\r\nhost: 127.0.0.1:")
        over.set()
        tasks.cancel_scope.cancel()


async def test_nothing_that_accepts_is_no_answer() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
    assert await SocketProber().answer("127.0.0.1", port, timeout_s=0.05) == 0  # accepted by the kernel alone
    await listener.aclose()
    assert await SocketProber().answer("127.0.0.1", port, timeout_s=5) == 0
