"""Standby machines: stopped until the host of a machine they watch is lost, and never beside what they replace."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from pantala.errors import CapacityError
from pantala.testing.clock import ManualClock
from pantala.testing.platform import SETTINGS, TestPlatform, running
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

IMAGE = "registry.pantala.test/web:v1"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def web(tmp_path: Path, clock: ManualClock) -> AsyncGenerator[TestPlatform]:
    """Three hosts; the app web."""
    settings = msgspec.structs.replace(SETTINGS, standby_after_s=30.0)
    async with running(tmp_path, clock=clock, settings=settings) as platform:
        await platform.add_agent("node-2")
        await platform.add_agent("node-3")
        await platform.create_app("web")
        yield platform


async def machine_on(web: TestPlatform, node: str, **config: Any) -> str:
    others = [agent for name, agent in web.agents.items() if name != node]
    for agent in others:
        agent.fail_next[wire.CreateMachine] = CapacityError("busy")
    made = await web.create_machine("web", config={"image": IMAGE} | config, region="iad")
    for agent in others:
        agent.fail_next.clear()
    assert made["node"] == node
    return str(made["id"])


def states(web: TestPlatform, machine_id: str) -> dict[str, str]:
    return {
        name: agent.machines[machine_id].state.value
        for name, agent in web.agents.items()
        if machine_id in agent.machines
    }


async def lose(web: TestPlatform, node: str) -> None:
    web.agents[node].silent = True
    answer = await web.http.post(f"/v1/hosts/{node}/lost", headers=web.auth)
    assert answer.status_code == 200, answer.text


async def cycles(web: TestPlatform) -> None:
    for _ in range(6):
        await web.control.moves.cycle()
        await web.control.standbys.cycle()


async def test_a_standby_is_stopped_until_the_watched_machine_s_host_is_lost(web: TestPlatform) -> None:
    watched = await machine_on(web, "node-1")
    standby = await machine_on(web, "node-2", standbys=[watched])
    await cycles(web)
    assert states(web, standby) == {"node-2": "created"}
    await lose(web, "node-1")
    await cycles(web)
    assert states(web, standby) == {"node-2": "started"}
    elsewhere = {name: state for name, state in states(web, watched).items() if name != "node-1"}
    assert list(elsewhere.values()) == ["stopped"], "what it replaces is placed anew without being started"
    starts = [call for call in web.agents["node-2"].calls if isinstance(call, wire.StartMachine)]
    assert [start.stands_for for start in starts] == [watched]


async def test_what_nobody_stands_by_for_starts_elsewhere(web: TestPlatform) -> None:
    lonely, watched = await machine_on(web, "node-1"), await machine_on(web, "node-1")
    standby = await machine_on(web, "node-2", standbys=[watched])
    await web.http.post(f"/v1/apps/web/machines/{watched}/stop", headers=web.auth)
    await lose(web, "node-1")
    await cycles(web)
    assert "started" in states(web, lonely).values()
    assert states(web, standby) == {"node-2": "created"}, "what did not run needs nobody in its place"


async def test_a_start_that_does_not_reach_the_standby_s_host_is_repeated(
    web: TestPlatform, clock: ManualClock
) -> None:
    watched = await machine_on(web, "node-1")
    standby = await machine_on(web, "node-2", standbys=[watched])
    await lose(web, "node-1")
    web.agents["node-2"].silent = True
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(web.control.standbys.cycle)
        await anyio.wait_all_tasks_blocked()
        await clock.advance(11)
    assert "started" not in states(web, standby).values()
    web.agents["node-2"].silent = False
    await cycles(web)
    assert states(web, standby) == {"node-2": "started"}
    assert not await web.control.standbys.cycle()


async def test_a_silent_host_is_lost_only_while_most_answer(web: TestPlatform, clock: ManualClock) -> None:
    watched = await machine_on(web, "node-1")
    standby = await machine_on(web, "node-2", standbys=[watched])
    web.agents["node-1"].silent = web.agents["node-3"].silent = True
    await web.control.standbys.cycle()
    await clock.advance(31)
    await web.control.standbys.cycle()
    hosts = {host["id"]: host["status"] for host in (await web.http.get("/v1/hosts", headers=web.auth)).json()}
    assert hosts["node-1"] == "active", "two of three are silent: who is cut off?"
    web.agents["node-3"].silent = False
    await web.control.standbys.cycle()
    await cycles(web)
    assert states(web, standby) == {"node-2": "started"}


async def test_refusals_name_their_field(web: TestPlatform) -> None:
    service = {"protocol": "tcp", "internal_port": 8080}
    for config, sentence in (
        ({"standbys": ["0123456789abcd"]}, "is no machine of web"),
        ({"standbys": ["0123456789abcd"], "services": [service]}, "requests would wake it"),
        ({"standbys": ["0123456789abcd"], "schedule": "hourly"}, "leave schedule and auto_destroy out"),
    ):
        body = {"config": {"image": IMAGE} | config}
        answer = await web.http.post("/v1/apps/web/machines", headers=web.auth, json=body)
        assert answer.status_code == 400, answer.text
        assert "config.standbys" in answer.json()["error"]
        assert sentence in answer.json()["error"]
