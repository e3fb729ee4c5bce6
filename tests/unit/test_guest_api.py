"""What a machine may ask of its agent through `/.fly/api`, over real connections."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import h11
import msgspec
import pytest

from pantala.agent.guest_api import BODY_BYTES_MAX, GuestApi
from pantala.testing.agent import RunningAgent, World
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"
OWN = f"/v1/apps/hello/machines/{ID}"
WITHIN_S = 10.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@asynccontextmanager
async def started(world: World) -> AsyncGenerator[RunningAgent]:
    async with world.agent() as agent, anyio.create_task_group() as tasks:
        await agent.create()
        await agent.wait("started")

        api = GuestApi(agent.api.handle, agent.host.hold)
        tasks.start_soon(api.serve, agent.host.machines[ID].record, world.driver.calls(ID))
        await until(lambda: _there(world), bool, within_s=WITHIN_S)
        yield agent
        tasks.cancel_scope.cancel()


async def _there(world: World) -> bool:
    return ID in world.driver.callers


class Caller:
    """A process of the machine with one connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(WITHIN_S)
        self._connection = connection
        self._http = h11.Connection(h11.CLIENT)

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        return await anyio.to_thread.run_sync(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: object) -> tuple[int, object]:
        data = b"" if body is None else msgspec.json.encode(body)
        headers = [("host", "api"), ("content-length", str(len(data)))]
        self._connection.sendall(self._http.send(h11.Request(method=method, target=path, headers=headers)) or b"")
        self._connection.sendall((self._http.send(h11.Data(data=data)) or b"") if data else b"")
        self._http.send(h11.EndOfMessage())
        status, said = 0, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(self._connection.recv(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                said += event.data
            elif isinstance(event, h11.EndOfMessage):
                if self._http.their_state is h11.DONE and self._http.our_state is h11.DONE:
                    self._http.start_next_cycle()
                return status, msgspec.json.decode(said)


@contextmanager
def caller(world: World) -> Generator[Caller]:
    with world.driver.call(ID) as connection:
        yield Caller(connection)


async def test_a_machine_reads_and_marks_itself_without_a_token(world: World) -> None:
    async with started(world):
        with caller(world) as asking:
            status, machine = await asking.ask("GET", OWN)
            assert status == 200
            assert isinstance(machine, dict)
            assert (machine["id"], machine["state"]) == (ID, "started")
            assert await asking.ask("POST", f"{OWN}/metadata/colour", {"value": "blue"}) == (200, {})
            _, machine = await asking.ask("GET", OWN)
            assert isinstance(machine, dict)
            assert machine["config"]["metadata"] == {"colour": "blue"}


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/apps/hello/machines/00000000000000", 404),
        ("GET", "/v1/apps/other/machines/" + ID, 404),
        ("GET", "/v1/apps/hello/machines", 404),
        ("GET", OWN + "0", 404),
        ("DELETE", OWN, 404),
        ("POST", "/v1/tokens/oidc", 501),
    ],
)
async def test_nothing_else_is_served(world: World, method: str, path: str, code: int) -> None:
    async with started(world):
        with caller(world) as asking:
            status, said = await asking.ask(method, path)
        assert status == code
        assert isinstance(said, dict)
        assert said["error"]


async def test_a_machine_holds_itself_awake_for_a_while(world: World) -> None:
    async with started(world) as agent:
        with caller(world) as asking:
            assert await asking.ask("POST", f"{OWN}/hold", {"seconds": 600, "reason": "a job"}) == (200, {})
            hold = (await agent.get()).hold
            assert hold is not None
            assert hold.reason == "a job"
            status, said = await asking.ask("POST", f"{OWN}/hold", {"seconds": 10**9})
            assert status == 400
            assert "seconds" in str(said)
            assert await asking.ask("DELETE", f"{OWN}/hold") == (200, {})
            assert (await agent.get()).hold is None


async def test_a_machine_may_suspend_itself(world: World) -> None:
    async with started(world) as agent:
        with caller(world) as asking:
            assert await asking.ask("POST", f"{OWN}/suspend") == (200, {})
        await agent.wait("suspended")


async def test_a_machine_may_stop_itself(world: World) -> None:
    async with started(world) as agent:
        with caller(world) as asking:
            assert await asking.ask("POST", f"{OWN}/stop", {"timeout": "1s"}) == (200, {})
        await agent.wait("stopped")


async def test_bad_input_is_named_and_bounded(world: World) -> None:
    async with started(world):
        with caller(world) as asking:
            status, said = await asking.ask("POST", f"{OWN}/signal", {"signal": "SIGNONE"})
            assert status == 400
            assert "signal" in str(said)
            status, _ = await asking.ask("POST", f"{OWN}/metadata/a", {"value": "x" * BODY_BYTES_MAX})
            assert status == 413


async def test_many_callers_wait_for_a_place_and_all_are_answered(world: World) -> None:
    async with started(world):
        answers: list[int] = []

        async def one() -> None:
            with caller(world) as asking:
                for _ in range(3):
                    answers.append((await asking.ask("GET", OWN))[0])

        with anyio.fail_after(WITHIN_S):
            async with anyio.create_task_group() as callers:
                for _ in range(20):
                    callers.start_soon(one)
        assert answers == [200] * 60
