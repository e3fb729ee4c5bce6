"""The waiting room: bounded, and a request that waited says why, to its client and to the app's log."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mesh_rig import Gate, cluster
from proxy_rig import Backend, Rig, app_rows, machine_row, running, service_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import ProxyFrame, Wake, WakeResult
from pantala.wire.machine import Concurrency, HTTPOptions, HTTPResponseOptions, Port

pytestmark = pytest.mark.anyio
HOST = "web.apps.test"
IP = "127.0.5.3"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path, queue_per_app_max=3, waiting_max=4, queue_timeout_ms=5_000) as rig:
        yield rig


async def web(rig: Rig, port: int, *machines: Any, app: str = "web", host: str = HOST, **service: Any) -> None:
    await rig.agent.rows(*app_rows(app, host), service_row(rig.ports, app, port, **service), *machines)


def wakes_up(rig: Rig, ip4: str) -> None:
    async def wake(frame: ProxyFrame) -> None:
        if isinstance(frame, Wake):
            await rig.agent.send(WakeResult(id=frame.id, machine=frame.machine, ok=True, ip4=ip4))

    rig.agent.on_frame = wake


def waits(header: str | None) -> dict[str, float]:
    found = re.findall(r'wait;desc="(\w+)";dur=([\d.]+)', header or "")
    return {why: float(ms) for why, ms in found}


@pytest.mark.parametrize(("state", "why"), [("stopped", "cold"), ("suspended", "resume")])
async def test_a_wake_is_told_to_the_client_and_to_the_app_s_log(rig: Rig, state: str, why: str) -> None:
    port = free_port()
    await rig.backend("one", IP, port)
    wakes_up(rig, IP)
    await web(rig, port, machine_row("web", "m1", "", state))
    first = await rig.get(HOST)
    assert list(waits(first.headers.get("server-timing"))) == [why]
    second = await rig.get(HOST)
    assert "server-timing" not in second.headers
    [line] = await rig.agent.frames_of("ProxyLog")
    assert (line.app, line.machine, line.code) == ("web", "m1", "")
    assert line.request_id == first.headers["fly-request-id"]
    assert re.fullmatch(rf"The request waited \d+ ms \({why}: .*\)\.", line.message)


async def test_pristine_answers_stay_as_they_are(rig: Rig) -> None:
    port = free_port()
    await rig.backend("one", IP, port)
    wakes_up(rig, IP)
    options = HTTPOptions(response=HTTPResponseOptions(pristine=True))
    ports = [Port(port=rig.ports.http, handlers=["http"], http_options=options)]
    await web(rig, port, machine_row("web", "m1", "", "stopped"), ports=ports)
    assert "server-timing" not in (await rig.get(HOST)).headers
    assert len(await rig.agent.frames_of("ProxyLog")) == 1, "the log says it all the same"


async def test_waiting_in_line_is_told(rig: Rig) -> None:
    gate, port = Gate(), free_port()
    await rig.backend("one", IP, port, gate)
    limits = Concurrency(type="requests", soft_limit=1, hard_limit=1)
    await web(rig, port, machine_row("web", "m1", IP), concurrency=limits)
    first = asyncio.create_task(rig.get(HOST))
    await gate.wait_for(1)
    second = asyncio.create_task(rig.get(HOST))
    await queued(rig, 1)
    gate.open.set()
    assert "server-timing" not in (await first).headers
    assert list(waits((await second).headers.get("server-timing"))) == ["queue"]


async def test_who_wants_one_machine_alone_holds_up_nobody_else(rig: Rig) -> None:
    gates, port, other = {"m1": Gate(), "m2": Gate()}, free_port(), "127.0.5.4"
    await rig.backend("m1", IP, port, gates["m1"])
    await rig.backend("m2", other, port, gates["m2"])
    limits = Concurrency(type="requests", soft_limit=1, hard_limit=1)
    await web(rig, port, machine_row("web", "m1", IP), machine_row("web", "m2", other), concurrency=limits)
    first = [asyncio.create_task(rig.get(HOST, **{"fly-force-instance-id": machine})) for machine in gates]
    for gate in gates.values():
        await gate.wait_for(1)
    forced = asyncio.create_task(rig.get(HOST, **{"fly-force-instance-id": "m1"}))
    await queued(rig, 1)
    anywhere = asyncio.create_task(rig.get(HOST))
    await queued(rig, 2)
    gates["m2"].open.set()
    assert (await anywhere).text == "m2"
    assert not forced.done()
    gates["m1"].open.set()
    assert (await forced).text == "m1"
    assert {response.status_code for response in await asyncio.gather(*first)} == {200}


async def test_a_wait_at_another_host_is_told_too(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr") as pair:
        here, there = pair.hosts
        port = free_port()
        await there.rig.backend("one", there.machines, port)
        wakes_up(there.rig, there.machines)
        await pair.web(port, pair.machine(there, "m1", "stopped", ip4=""))
        response = await here.rig.get(HOST)
        assert list(waits(response.headers.get("server-timing"))) == ["cold"]
        [line] = await here.rig.agent.frames_of("ProxyLog")
        assert (line.machine, line.code) == ("m1", "")
        assert not [f for f in there.rig.agent.frames if type(f).__name__ == "ProxyLog"], "told once"


async def test_the_room_holds_so_many_for_an_app_and_so_many_in_all(rig: Rig) -> None:
    port = free_port()
    for app in ("web", "two"):
        await web(rig, port, machine_row(app, f"m-{app}", "", "stopped"), app=app, host=f"{app}.apps.test")
    waiting = [asyncio.create_task(rig.get(HOST)) for _ in range(3)]
    await inside(rig, 3)
    full = await rig.get(HOST, accept="application/json")
    assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (503, "PR04", "1")
    assert "3 requests already wait" in full.json()["error"]
    waiting.append(asyncio.create_task(rig.get("two.apps.test")))
    await inside(rig, 4)
    full = await rig.get("two.apps.test", accept="application/json")
    assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (503, "PR04", "1")
    assert "of all apps" in full.json()["error"]
    backend = Backend("one", IP, port)
    await backend.start()
    try:
        for wake in await rig.agent.frames_of("Wake", lambda frames: len(frames) == 2):
            await rig.agent.send(WakeResult(id=wake.id, machine=wake.machine, ok=True, ip4=IP))
        assert {r.status_code for r in await asyncio.gather(*waiting)} == {200}
    finally:
        await backend.stop()
    await inside(rig, 0)


async def test_who_waits_too_long_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with running(tmp_path, wake_timeout_ms=300) as rig:
        await web(rig, free_port(), machine_row("web", "m1", "", "stopped"))
        response = await rig.get(HOST, accept="application/json")
        assert (response.status_code, response.json()["code"], response.headers["retry-after"]) == (503, "PM03", "2")
        assert waits(response.headers["server-timing"])["cold"] >= 250
        [line] = await rig.agent.frames_of("ProxyLog")
        assert (line.code, "cold" in line.message) == ("PM03", True)


async def inside(rig: Rig, number: int) -> None:
    await gauge(rig, "pantala_proxy_waiting", number)


async def queued(rig: Rig, number: int) -> None:
    await gauge(rig, "pantala_proxy_queue_length", number)


async def gauge(rig: Rig, name: str, number: int) -> None:
    async def lines() -> list[str]:
        return [line for line in (await rig.admin("/metrics") or "").splitlines() if line.startswith(name)]

    await until(lines, lambda now: f"{name} {number}" in now, within_s=15, every_s=0.02)
