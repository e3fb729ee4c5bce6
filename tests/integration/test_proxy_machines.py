"""Which machine serves, and what happens when none does at once: wakes, drains, queues, retries, an absent agent."""

from __future__ import annotations

import asyncio
import collections
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from proxy_rig import (
    WITHIN_S,
    Backend,
    Request,
    Rig,
    answer,
    app_rows,
    machine_row,
    row,
    running,
    service_row,
)

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import Drain, ProxyFrame, Undrain, Wake, WakeResult
from pantala.wire.machine import Concurrency

pytestmark = pytest.mark.anyio
HOST = "web.apps.test"
ONE, TWO = "127.0.2.1", "127.0.2.2"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path, wake_timeout_ms=10_000, wake_hold_ms=3_000, queue_timeout_ms=1_500) as rig:
        yield rig


async def web(rig: Rig, port: int, *machines: Any, **service: Any) -> None:
    await rig.agent.rows(*app_rows("web", HOST), service_row(rig.ports, "web", port, **service), *machines)


def wakes_of(rig: Rig) -> list[Wake]:
    return [frame for frame in rig.agent.frames if isinstance(frame, Wake)]


async def load_of(rig: Rig, machine: str, wanted: Callable[[Any], bool]) -> Any:
    def found(frames: list[Any]) -> bool:
        return any(wanted(load) for load in frames[-1].machines if load.machine == machine)

    frames = await rig.agent.frames_of("Load", lambda frames: bool(frames) and found(frames))
    return next(load for load in frames[-1].machines if load.machine == machine)


class Gate:
    """A handler that answers when it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, backend: Backend, request: Request) -> bytes:
        await self.open.wait()
        return answer(backend.name.encode())


# -- balance -----------------------------------------------------------------------------------------------------


async def test_the_least_loaded_below_its_soft_limit(rig: Rig) -> None:
    gate, port = Gate(), free_port()
    one = await rig.backend("one", ONE, port, gate)
    two = await rig.backend("two", TWO, port, gate)
    await web(rig, port, machine_row("web", "m1", ONE), machine_row("web", "m2", TWO))
    requests = [asyncio.create_task(rig.get(HOST)) for _ in range(20)]
    await until_busy(20, one, two)
    assert (one.busy, two.busy) == (10, 10)
    gate.open.set()
    assert {r.status_code for r in await asyncio.gather(*requests)} == {200}


async def until_busy(wanted: int, *backends: Backend) -> None:
    async def busy() -> int:
        return sum(b.busy for b in backends)

    await until(busy, lambda n: n == wanted, within_s=WITHIN_S, every_s=0.01)


async def test_a_cordoned_or_failing_machine_gets_nothing(rig: Rig) -> None:
    port = free_port()
    one = await rig.backend("one", ONE, port)
    await rig.backend("two", TWO, port)
    changes: list[dict[str, Any]] = [{"cordoned": True}, {"passing": [False]}]
    for change in changes:
        await web(rig, port, machine_row("web", "m1", ONE, **change), machine_row("web", "m2", TWO))
        assert {(await rig.get(HOST)).text for _ in range(10)} == {"two"}
    assert one.requests == []


async def test_the_hard_limit_queues_and_then_says_503(rig: Rig) -> None:
    gate, port = Gate(), free_port()
    one = await rig.backend("one", ONE, port, gate)
    limits = Concurrency(type="requests", soft_limit=1, hard_limit=2)
    await web(rig, port, machine_row("web", "m1", ONE), concurrency=limits)
    held = [asyncio.create_task(rig.get(HOST)) for _ in range(2)]
    await until_busy(2, one)
    over = await asyncio.gather(*(rig.get(HOST, accept="application/json") for _ in range(3)))
    assert {(r.status_code, r.json()["code"], r.headers["retry-after"]) for r in over} == {(503, "PR04", "2")}
    assert one.busy_max == 2
    gate.open.set()
    assert {r.status_code for r in await asyncio.gather(*held)} == {200}


async def test_queued_requests_are_served_when_slots_free(rig: Rig) -> None:
    port = free_port()

    async def slow(backend: Backend, request: Request) -> bytes:
        await anyio.sleep(0.01)
        return answer(b"ok")

    one = await rig.backend("one", ONE, port, slow)
    limits = Concurrency(type="requests", soft_limit=1, hard_limit=2)
    await web(rig, port, machine_row("web", "m1", ONE), concurrency=limits)
    responses = await asyncio.gather(*(rig.get(HOST) for _ in range(60)))
    assert collections.Counter(r.status_code for r in responses) == {200: 60}
    assert one.busy_max == 2


async def test_another_machine_when_the_first_refuses(rig: Rig) -> None:
    port = free_port()
    await rig.backend("two", TWO, port)
    await web(rig, port, machine_row("web", "m1", ONE), machine_row("web", "m2", TWO))
    async with httpx2.AsyncClient(trust_env=False) as client:
        for _ in range(10):
            response = await client.post(
                f"http://127.0.0.1:{rig.ports.http}/", headers={"host": HOST}, content=b"x" * 200_000
            )
            assert (response.status_code, response.text) == (200, "two")


async def test_nobody_listens_is_told_with_a_code(rig: Rig) -> None:
    await web(rig, free_port(), machine_row("web", "m1", ONE))
    response = await rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (502, "PC01")
    [log] = await rig.agent.frames_of("ProxyLog")
    assert (log.app, log.code, log.machine) == ("web", "PC01", "m1")
    assert log.request_id == response.headers["fly-request-id"]


async def test_no_second_try_once_the_app_may_have_acted(rig: Rig) -> None:
    port = free_port()

    async def die(backend: Backend, request: Request) -> bytes:
        raise ConnectionError

    one = await rig.backend("one", ONE, port, die)
    await web(rig, port, machine_row("web", "m1", ONE))
    async with httpx2.AsyncClient(trust_env=False) as client:
        response = await client.post(f"http://127.0.0.1:{rig.ports.http}/", headers={"host": HOST}, content=b"pay")
    assert (response.status_code, len(one.requests)) == (502, 1)
    assert (await rig.get(HOST)).status_code == 502
    assert len(one.requests) == 1 + 2


async def test_a_client_may_ask_for_a_machine(rig: Rig) -> None:
    port = free_port()
    one = await rig.backend("one", ONE, port)
    await rig.backend("two", TWO, port)
    await web(rig, port, machine_row("web", "m1", ONE), machine_row("web", "m2", TWO))
    for _ in range(5):
        assert (await rig.get(HOST, **{"fly-force-instance-id": "m1"})).text == "one"
        assert (await rig.get(HOST, **{"fly-prefer-instance-id": "m2"})).text == "two"
        assert (await rig.get(HOST, **{"fly-force-region": "lhr, iad"})).status_code == 200
    assert (await rig.get(HOST, **{"fly-force-instance-id": "m9"})).status_code == 503
    assert (await rig.get(HOST, **{"fly-force-region": "lhr"})).status_code == 503
    await rig.agent.rows(machine_row("web", "m2", TWO, cordoned=True))
    response = await rig.get(HOST, **{"fly-prefer-instance-id": "m2", "fly-preferred-instance-unavailable": "x"})
    assert response.text == "one"
    assert one.requests[-1].header("fly-preferred-instance-unavailable") == "m2"


# -- wakes -------------------------------------------------------------------------------------------------------


async def test_a_hundred_requests_wake_once_and_wait(rig: Rig) -> None:
    port = free_port()
    one = Backend("one", ONE, port)
    limits = Concurrency(type="requests", soft_limit=100, hard_limit=200)
    await web(rig, port, machine_row("web", "m1", "", "stopped"), concurrency=limits)
    requests = [asyncio.create_task(rig.get(HOST)) for _ in range(100)]
    await rig.agent.frames_of("Wake")
    await one.start()
    try:
        [wake] = wakes_of(rig)
        assert (wake.machine, wake.deadline_ms > 5_000) == ("m1", True)
        await rig.agent.send(WakeResult(id=wake.id, machine="m1", ok=True, ip4=ONE))
        responses = await asyncio.gather(*requests)
    finally:
        await one.stop()
    assert collections.Counter((r.status_code, r.text) for r in responses) == {(200, "one"): 100}
    assert len(wakes_of(rig)) == 1


async def test_a_refused_wake_is_told(rig: Rig) -> None:
    await web(rig, free_port(), machine_row("web", "m1", "", "stopped"))

    async def refuse(frame: ProxyFrame) -> None:
        if isinstance(frame, Wake):
            result = WakeResult(id=frame.id, machine="m1", ok=False, code="PM07", reason="no memory left")
            await rig.agent.send(result)

    rig.agent.on_frame = refuse
    response = await rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (503, "PM07")
    assert "no memory left" in response.json()["error"]


async def test_a_full_fleet_wakes_one_more_and_serves_meanwhile(rig: Rig) -> None:
    gate, port = Gate(), free_port()
    one = await rig.backend("one", ONE, port, gate)
    two = await rig.backend("two", TWO, port)
    limits = Concurrency(type="requests", soft_limit=2, hard_limit=10)
    machines = (machine_row("web", "m1", ONE), machine_row("web", "m2", "", "stopped"))
    await web(rig, port, *machines, concurrency=limits)
    held = [asyncio.create_task(rig.get(HOST)) for _ in range(2)]
    await until_busy(2, one)
    third = asyncio.create_task(rig.get(HOST))
    [wake] = await rig.agent.frames_of("Wake")
    fourth = asyncio.create_task(rig.get(HOST))
    await until_busy(3, one)  # while the wake is on its way others go where there is room
    await rig.agent.send(WakeResult(id=wake.id, machine="m2", ok=True, ip4=TWO))
    assert (await third).text == "two"
    gate.open.set()
    assert {r.text for r in await asyncio.gather(*held, fourth)} == {"one"}
    assert (wake.machine, len(two.requests)) == ("m2", 1)


async def test_without_autostart_nothing_is_woken(rig: Rig) -> None:
    await web(rig, free_port(), machine_row("web", "m1", "", "stopped"), autostart=False)
    assert (await rig.get(HOST)).status_code == 503
    assert wakes_of(rig) == []


async def test_a_machine_in_transit_is_waited_for(rig: Rig) -> None:
    port = free_port()
    await rig.backend("one", ONE, port)
    for state in ("starting", "updating", "restarting", "replacing"):
        await web(rig, port, machine_row("web", "m1", "", state))
        request = asyncio.create_task(rig.get(HOST))
        await load_unchanged(rig)
        assert not request.done()
        await web(rig, port, machine_row("web", "m1", ONE, instance_id=f"01{state}"))
        assert (await request).status_code == 200
    await web(rig, port, machine_row("web", "m1", "", "stopping"))
    request = asyncio.create_task(rig.get(HOST))
    await load_unchanged(rig)
    await web(rig, port, machine_row("web", "m1", "", "stopped"))
    [wake] = await rig.agent.frames_of("Wake")
    await rig.agent.send(WakeResult(id=wake.id, machine="m1", ok=True, ip4=ONE))
    assert (await request).status_code == 200


async def test_a_machine_that_comes_and_goes_for_ever_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with running(tmp_path, wake_timeout_ms=2_000) as rig:
        port = free_port()
        await web(rig, port, machine_row("web", "m1", "", "stopped"))

        async def wake(frame: ProxyFrame) -> None:
            if isinstance(frame, Wake):
                await rig.agent.send(WakeResult(id=frame.id, machine="m1", ok=True, ip4=ONE))

        async def flip() -> None:
            """A crash at start, again and again, at the pace of a real machine."""
            for turn in itertools.count(1):
                for state, address in (
                    ("starting", ""),
                    ("started", ONE),
                    ("stopped" if turn % 8 == 0 else "starting", ""),
                ):
                    await rig.agent.rows(machine_row("web", "m1", address, state, instance_id=f"01{turn}"))
                    await asyncio.sleep(0.3)

        rig.agent.on_frame = wake
        flipping = asyncio.create_task(flip())
        try:
            response = await asyncio.wait_for(rig.get(HOST, accept="application/json"), WITHIN_S)
        finally:
            flipping.cancel()
        seen = (response.status_code, response.json()["code"])
        assert seen == (502, "PC01")  # the machine was reached once, which says more than that it is not there now
        [log] = await rig.agent.frames_of("ProxyLog")
        assert (log.app, log.code, log.machine) == ("web", "PC01", "m1")


async def load_unchanged(rig: Rig) -> None:
    """A round trip through the proxy, so that what was sent before it has been looked at."""
    assert (await rig.get("nobody.test")).status_code == 404


async def test_a_wake_is_held_for_an_agent_that_comes_back(rig: Rig) -> None:
    port = free_port()
    await rig.backend("one", ONE, port)
    await web(rig, port, machine_row("web", "m1", "", "stopped"))
    await rig.agent.stop()
    request = asyncio.create_task(rig.get(HOST))
    await load_unchanged(rig)
    await rig.agent.start()
    [wake] = await rig.agent.frames_of("Wake")
    await rig.agent.send(WakeResult(id=wake.id, machine="m1", ok=True, ip4=ONE))
    assert (await request).text == "one"


async def test_an_agent_that_stays_away_is_not_waited_for_for_ever(rig: Rig) -> None:
    await web(rig, free_port(), machine_row("web", "m1", "", "stopped"))
    await rig.agent.stop()
    response = await rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (503, "PM02")


# -- drains ------------------------------------------------------------------------------------------------------


async def test_a_drain_waits_for_what_is_in_flight_and_sends_others_elsewhere(rig: Rig) -> None:
    gate, other_gate, port = Gate(), Gate(), free_port()
    one = await rig.backend("one", ONE, port, gate)
    two = await rig.backend("two", TWO, port, other_gate)
    await web(rig, port, machine_row("web", "m1", ONE))
    held = asyncio.create_task(rig.get(HOST))
    await until_busy(1, one)
    await rig.agent.send(Drain(id=5, machine="m1", deadline_ms=10_000))
    await web(rig, port, machine_row("web", "m2", TWO))  # applied after the drain, which came before it
    others = [asyncio.create_task(rig.get(HOST)) for _ in range(5)]
    await until_busy(6, one, two)
    assert (one.busy, two.busy) == (1, 5)
    other_gate.open.set()
    assert {(await other).text for other in others} == {"two"}
    assert not [f for f in rig.agent.frames if type(f).__name__ == "Drained"]
    gate.open.set()
    assert (await held).text == "one"
    [drained] = await rig.agent.frames_of("Drained")
    assert (drained.id, drained.machine, drained.result) == (5, "m1", "drained")


async def test_a_drain_of_a_machine_that_had_a_request_since_is_busy(rig: Rig) -> None:
    port = free_port()
    await rig.backend("one", ONE, port)
    await web(rig, port, machine_row("web", "m1", ONE))
    seen = await load_of(rig, "m1", lambda load: load.seq == 0)
    assert (await rig.get(HOST)).status_code == 200
    await rig.agent.send(Drain(id=1, machine="m1", deadline_ms=5_000, load_seq=seen.seq))
    [busy] = await rig.agent.frames_of("Drained")
    assert busy.result == "busy"
    assert (await rig.get(HOST)).text == "one"
    now = await load_of(rig, "m1", lambda load: load.seq == 2 and load.in_flight == 0)
    await rig.agent.send(Drain(id=2, machine="m1", deadline_ms=5_000, load_seq=now.seq))
    drained = (await rig.agent.frames_of("Drained", lambda frames: len(frames) == 2))[-1]
    assert (drained.id, drained.result) == (2, "drained")
    waiting = asyncio.create_task(rig.get(HOST))
    await load_unchanged(rig)
    assert not waiting.done()
    await rig.agent.send(Undrain(machine="m1"))
    assert (await waiting).text == "one"


async def test_a_request_for_a_drained_machine_waits_for_its_next_version(rig: Rig) -> None:
    port = free_port()
    old = await rig.backend("old", ONE, port)
    await web(rig, port, machine_row("web", "m1", ONE))
    assert (await rig.get(HOST)).text == "old"
    await rig.agent.send(Drain(id=1, machine="m1", deadline_ms=5_000))
    await rig.agent.frames_of("Drained")
    waiting = [asyncio.create_task(rig.get(HOST)) for _ in range(10)]
    await load_unchanged(rig)
    await rig.agent.rows(machine_row("web", "m1", ONE, "updating"))
    await old.stop()
    await rig.backend("new", ONE, port)
    await rig.agent.rows(machine_row("web", "m1", ONE, instance_id="01B"))
    assert {(await one).text for one in waiting} == {"new"}


async def test_the_deadline_closes_websockets_with_1001(rig: Rig) -> None:
    port = free_port()
    await rig.backend("one", ONE, port)
    await web(rig, port, machine_row("web", "m1", ONE))
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.ports.http)
    writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".encode())
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WITHIN_S)).startswith(b"HTTP/1.1 101")
    writer.write(b"\x81\x02hi")
    assert await asyncio.wait_for(reader.readexactly(4), WITHIN_S) == b"\x81\x02hi"
    await rig.agent.send(Drain(id=1, machine="m1", deadline_ms=100))
    assert await asyncio.wait_for(reader.read(), WITHIN_S) == b"\x88\x02\x03\xe9"
    [drained] = await rig.agent.frames_of("Drained")
    assert drained.result == "deadline"
    writer.close()


def ends_with(drain: int) -> Callable[[list[Any]], bool]:
    return lambda frames: bool(frames) and frames[-1].id == drain


async def test_no_request_is_lost_while_machines_are_replaced(rig: Rig) -> None:
    """Kept and new connections, no retry in the client, twelve replacements of both machines in turn."""
    port = free_port()
    backends = {"m1": await rig.backend("v0", ONE, port), "m2": await rig.backend("v0", TWO, port)}
    places = {"m1": ONE, "m2": TWO}
    await web(rig, port, machine_row("web", "m1", ONE), machine_row("web", "m2", TWO))
    outcomes: collections.Counter[object] = collections.Counter()
    ended = False

    async def keep_asking(client: httpx2.AsyncClient | None) -> None:
        url, headers = f"http://127.0.0.1:{rig.ports.http}/", {"host": HOST}
        while not ended:
            try:
                posted = client.post(url, headers=headers, content=b"x" * 1000) if client else rig.get(HOST)
                response = await posted
                outcomes[response.status_code] += 1
            except httpx2.TransportError as error:
                outcomes[repr(error)] += 1

    async with httpx2.AsyncClient(trust_env=False, timeout=WITHIN_S) as kept, asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(keep_asking(kept))
        for _ in range(2):
            group.create_task(keep_asking(None))
        for version in range(12):
            machine = f"m{version % 2 + 1}"
            await rig.agent.send(Drain(id=version, machine=machine, deadline_ms=5_000))
            await rig.agent.frames_of("Drained", ends_with(version))
            await rig.agent.rows(machine_row("web", machine, places[machine], "updating"))
            await backends[machine].stop()
            backends[machine] = await rig.backend(f"v{version}", places[machine], port)
            await rig.agent.rows(machine_row("web", machine, places[machine], instance_id=f"01{version}"))
        ended = True
    assert set(outcomes) == {200}, outcomes
    assert outcomes[200] > 100


async def test_a_kept_connection_that_the_app_closed_costs_no_request(rig: Rig) -> None:
    port = free_port()
    one = await rig.backend("one", ONE, port)
    await web(rig, port, machine_row("web", "m1", ONE))
    for _ in range(20):
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
            url = f"http://127.0.0.1:{rig.ports.http}/"
            response = await client.post(url, headers={"host": HOST}, content=b"pay")
        assert response.status_code == 200
        await one.stop()
        await one.start()


async def test_a_kept_connection_that_ends_with_the_request_on_it_costs_none(rig: Rig) -> None:
    served: set[int] = set()

    async def once_per_connection(backend: Backend, request: Request) -> bytes:
        if backend.connections in served:
            raise ConnectionError
        served.add(backend.connections)
        return answer(b"ok")

    port = free_port()
    one = await rig.backend("one", ONE, port, once_per_connection)
    await web(rig, port, machine_row("web", "m1", ONE))
    async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
        for _ in range(5):
            response = await client.post(
                f"http://127.0.0.1:{rig.ports.http}/", headers={"host": HOST}, content=b"x" * 100_000
            )
            assert response.status_code == 200
    assert (one.connections, len(one.requests)) == (5, 9)


# -- without an agent --------------------------------------------------------------------------------------------


async def test_serving_starts_from_the_saved_view_without_an_agent(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        port = free_port()
        await rig.backend("one", ONE, port)
        await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
        await web(rig, port, machine_row("web", "m1", ONE))
        saved = tmp_path / "state" / "snapshot-0.json"

        async def text() -> str:
            return saved.read_text() if saved.exists() else ""

        await until(text, lambda seen: '"m/m1"' in seen, within_s=WITHIN_S)
        assert saved.stat().st_mode & 0o777 == 0o600
        assert await rig.stop(signal.SIGKILL) == -signal.SIGKILL
        await rig.agent.stop()
        await rig.start()
        assert (await rig.get(HOST)).text == "one"
        async with rig.client(HOST) as client:
            assert (await client.get("/", extensions={"sni_hostname": HOST})).text == "one"
        await rig.agent.start()
        await rig.agent.rows(machine_row("web", "m1", ONE, cordoned=True))
        await rig.agent.applied()
        assert (await rig.get(HOST)).status_code == 503


async def test_two_crashes_go_back_one_view(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        port = free_port()
        await rig.backend("one", ONE, port)
        state = tmp_path / "state"

        async def generations() -> tuple[bool, bool]:
            texts = [(state / f"snapshot-{n}.json") for n in (0, 1)]
            newest, before = (path.read_text() if path.exists() else "" for path in texts)
            return '"host/late.test"' in newest, '"m/m1"' in before

        await web(rig, port, machine_row("web", "m1", ONE))
        await until(generations_written(state), bool, within_s=WITHIN_S)
        await rig.agent.rows(row("routes", "host/late.test", {"app": "web"}))
        await until(generations, lambda seen: seen == (True, True), within_s=WITHIN_S)
        await rig.agent.stop()
        for _ in range(2):
            await rig.stop(signal.SIGKILL)
            await rig.start()
        assert (await rig.get(HOST)).text == "one"
        assert (await rig.get("late.test")).status_code == 404
        await rig.agent.start()
        rig.agent.revision += 1
        assert await rig.agent.applied() == ["host/late.test"]


def generations_written(state: Path) -> Any:
    async def look() -> bool:
        path = state / "snapshot-0.json"
        return path.exists() and '"m/m1"' in path.read_text()

    return look


async def test_sigterm_finishes_what_it_began(rig: Rig) -> None:
    gate, port = Gate(), free_port()
    one = await rig.backend("one", ONE, port, gate)
    await web(rig, port, machine_row("web", "m1", ONE))
    held = asyncio.create_task(rig.get(HOST))
    await until_busy(1, one)
    leaving = asyncio.create_task(rig.stop())

    async def refused() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", rig.ports.http)
        except OSError:
            return True
        writer.close()
        return False

    await until(refused, bool, within_s=WITHIN_S)
    gate.open.set()
    response = await held
    assert (response.text, response.headers["connection"]) == ("one", "close")
    assert await leaving == 0
    assert not (rig.folder / "state" / "running.json").exists()
