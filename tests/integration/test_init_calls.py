"""Calls of a machine's processes to the platform: they reach whoever takes them, and wait while nobody does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from init_rig import Init

from pantala.drivers import guest, ring
from pantala.wire.guest import Start, Started

pytestmark = [pytest.mark.anyio, pytest.mark.root]

WITHIN_S = 20.0


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("i")


@pytest.fixture
def init(folder: Path) -> Iterator[Init]:
    made = Init(folder, ring.RING_CAPACITY_MIN)
    yield made
    made.process.kill()
    made.process.wait()


async def started(init: Init, folder: Path) -> Path:
    """Where its processes call."""
    path = folder / "fly" / "api"
    start = Start(argv=["/bin/sleep", "1000"], env={}, api_socket=str(path))
    assert isinstance(await guest.call(init.socket, start), Started)
    return path


def call(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WITHIN_S)
    connection.connect(str(path))
    return connection


async def test_a_call_is_handed_over_as_it_is(init: Init, folder: Path) -> None:
    path = await started(init, folder)
    assert path.stat().st_mode & 0o777 == 0o666, "anybody in the machine may call"
    async with aclosing(guest.take_calls(init.socket)) as calls:
        with anyio.fail_after(WITHIN_S):
            for number in range(3):
                with call(path) as inside, await anext(calls) as outside:
                    inside.sendall(b"ping %d" % number)
                    assert outside.recv(100) == b"ping %d" % number
                    outside.sendall(b"pong")
                    assert inside.recv(100) == b"pong"


async def test_calls_wait_for_an_agent_and_go_to_the_newest(init: Init, folder: Path) -> None:
    path = await started(init, folder)
    with call(path) as early:
        early.sendall(b"early")
        with anyio.fail_after(WITHIN_S):
            async with aclosing(guest.take_calls(init.socket)) as calls:
                with await anext(calls) as outside:
                    assert outside.recv(100) == b"early"
            with call(path) as between:
                between.sendall(b"between")
                async with aclosing(guest.take_calls(init.socket)) as calls:
                    with await anext(calls) as outside:
                        assert outside.recv(100) == b"between"


async def test_the_end_of_the_machine_ends_it(init: Init, folder: Path) -> None:
    await started(init, folder)
    with anyio.fail_after(WITHIN_S):
        async with aclosing(guest.take_calls(init.socket)) as calls, anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, init.process.kill)
            assert [call async for call in calls] == []
