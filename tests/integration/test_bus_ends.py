"""A bus that ends leaves no task behind, whatever its server was doing; who wants no echo hears none."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import anyio
import pytest

from pantala.kit import binaries
from pantala.kit.bus_nats import connect
from pantala.testing.ports import free_port

pytestmark = pytest.mark.anyio

WITHIN_S = 15.0
CLIENTS = 100


@pytest.fixture
def server(tmp_path: Path) -> Generator[tuple[str, Callable[[], None]]]:
    """Where it is, and what kills it and starts it anew."""
    port = free_port()
    running: list[subprocess.Popen[bytes]] = []

    def restart() -> None:
        for process in running:
            process.kill()
            process.wait()
        with (tmp_path / "log").open("ab") as log:
            command = [str(binaries.find("nats-server")), "-a", "127.0.0.1", "-p", str(port)]
            running[:] = [subprocess.Popen(command, stderr=log)]

    restart()
    try:
        yield f"nats://127.0.0.1:{port}", restart
    finally:
        for process in running:
            process.kill()
            process.wait()


async def test_nothing_is_left_of_a_bus_that_ends_while_it_connects_again(
    server: tuple[str, Callable[[], None]],
) -> None:
    url, restart = server
    before = asyncio.all_tasks()

    async def one(lives_s: float) -> None:
        async with connect(url, wait_s=WITHIN_S) as bus:
            await bus.publish("anything", b"")
            connected.append(1)
            await anyio.sleep(lives_s)

    connected: list[int] = []
    async with anyio.create_task_group() as tasks:
        for number in range(CLIENTS):
            tasks.start_soon(one, 1.0 + number * 0.02)
        while len(connected) < CLIENTS:
            await anyio.sleep(0.01)
        for _ in range(30):
            restart()
            await anyio.sleep(0.1)
    left = [task for task in asyncio.all_tasks() - before if not task.done()]
    assert left == []


async def test_an_owner_without_echo_hears_others_and_not_itself(server: tuple[str, Callable[[], None]]) -> None:
    url, _ = server
    heard: list[bytes] = []

    async def hear(subject: str, payload: bytes) -> None:
        del subject
        heard.append(payload)

    async with connect(url, wait_s=WITHIN_S, echo=False) as own, connect(url, wait_s=WITHIN_S) as other:
        await own.serve("beats", hear)
        await own.publish("beats", b"of its own")
        await own.serve("others", hear)  # returns once the server has taken what came before
        await other.publish("beats", b"of another")
        with anyio.fail_after(WITHIN_S):
            while not heard:
                await anyio.sleep(0.01)
        assert heard == [b"of another"]
