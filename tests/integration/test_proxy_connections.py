"""Connections as such: those without HTTP say in the app's log that they waited, and each counts for its app, however
the app is known."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from entry_rig import DEDICATED, EntryRig, Told, entry_rig, line
from entry_rig import NAME as HOST
from mesh_rig import cluster
from proxy_rig import Rig, app_rows, machine_row, row, running, service_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import ProxyFrame, ServiceRow, Wake, WakeResult
from pantala.wire.machine import Concurrency, Port

pytestmark = pytest.mark.anyio
IP = "127.0.9.110"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[EntryRig]:
    async with entry_rig(tmp_path) as rig:
        yield rig


async def waited(agent: Any) -> Any:
    """The one line about a wait."""

    def said(frames: list[Any]) -> bool:
        return any("waited" in frame.message for frame in frames)

    [found] = await agent.frames_of("ProxyLog", said)
    return found


def is_id(text: str) -> bool:
    return re.fullmatch(r"[0-9A-Z]{26}-iad", text) is not None


# -- waits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "mqtt", "text"])
async def test_a_connection_that_woke_a_machine_says_so_in_the_apps_log(rig: EntryRig, kind: str) -> None:
    service = one_at_a_time(rig.app.port, *rig.doors.services())
    await rig.rows(row("routes", "svc/web/d1", service), machine_row("web", "m1", "", "stopped"))

    async def wake(frame: ProxyFrame) -> None:
        if isinstance(frame, Wake):
            await rig.rig.agent.send(WakeResult(id=frame.id, machine=frame.machine, ok=True, ip4="127.0.9.100"))

    rig.rig.agent.on_frame = wake
    tls = {"ssl": rig.ca.context("mqtt"), "server_hostname": HOST} if kind == "mqtt" else {}
    async with line(DEDICATED, getattr(rig.doors, kind), **tls) as client:
        await client.say(b"~")
        assert (await client.reader.readuntil(b"~")).endswith(b"~")
    said = await waited(rig.rig.agent)
    assert re.fullmatch(r"The connection waited \d+ ms \(cold: .*\)\.", said.message)
    assert (said.app, said.machine, said.code, is_id(said.request_id)) == ("web", "m1", "", True)


async def test_a_connection_in_line_says_so_too(rig: EntryRig) -> None:
    await rig.rows(row("routes", "svc/web/d1", one_at_a_time(rig.app.port, Port(port=rig.doors.raw))))
    async with line(DEDICATED, rig.doors.raw) as first:
        await first.say(b"a")
        assert await first.hear(1) == b"A"
        async with line(DEDICATED, rig.doors.raw) as second:
            await second.say(b"b")
            await queued(rig.rig, 1)
            first.writer.write_eof()
            assert await first.rest() == b"BYE"
            assert await second.hear(1) == b"B"
    said = await waited(rig.rig.agent)
    assert "(queue: every machine was at its hard limit)" in said.message


async def test_a_connection_that_waited_at_another_host_says_so_once(tmp_path: Path) -> None:
    door, address, told = free_port(), "127.0.9.1", Told()
    async with cluster(tmp_path, "iad", "lhr", each=[{"entry_listen": [f"{address}:{door}"]}, {}]) as made:
        here, there = made.hosts
        await told.start(there.machines)

        async def wake(frame: ProxyFrame) -> None:
            if isinstance(frame, Wake):
                await there.rig.agent.send(WakeResult(id=frame.id, machine=frame.machine, ok=True, ip4=there.machines))

        there.rig.agent.on_frame = wake
        try:
            await made.web(told.port, made.machine(there, "m1", "stopped", ip4=""))
            service = one_at_a_time(told.port, Port(port=door))
            dedicated = row("routes", f"addr/{address}", {"kind": "dedicated", "app": "web"})
            await made.rows(row("routes", "svc/web/d1", service), dedicated)
            async with line(address, door) as client:
                await client.say(b"~")
                assert await client.hear(1) == b"~"
            said = await waited(here.rig.agent)
            assert (said.machine, "(cold: " in said.message, is_id(said.request_id)) == ("m1", True, True)
            assert not [frame for frame in there.rig.agent.frames if type(frame).__name__ == "ProxyLog"]
        finally:
            await told.stop()


async def test_a_connection_that_failed_has_an_id_in_the_log(rig: EntryRig) -> None:
    await rig.app.stop()
    async with line(DEDICATED, rig.doors.raw) as client:
        assert await client.rest() == b""
    [said] = await rig.rig.agent.frames_of("ProxyLog")
    assert (said.code, is_id(said.request_id)) == ("PC01", True)


# -- how many ----------------------------------------------------------------------------------------------------


async def test_plain_http_by_name_counts_among_the_connections_of_its_app(tmp_path: Path) -> None:
    async with running(tmp_path, connections_per_app_max=1) as rig:
        port = free_port()
        await rig.backend("one", IP, port)
        for app in ("web", "two"):
            await rig.agent.rows(*app_rows(app, f"{app}.apps.test"), service_row(rig.ports, app, port))
            await rig.agent.rows(machine_row(app, f"m-{app}", IP))
        async with line(rig.address, rig.ports.http) as silent, line(rig.address, rig.ports.http) as kept:
            assert b" 200 OK" in await ask(kept, "web")
            assert b" 200 OK" in await ask(kept, "web")
            refused = await rig.get("web.apps.test", accept="application/json")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.headers["connection"] == "close"
            [line_of_log] = await rig.agent.frames_of("ProxyLog")
            assert line_of_log.message.startswith("1 connections were dropped: the app has 1 at this edge")
            assert b" 200 OK" in await ask(kept, "two"), "it goes over to the app that it asks for"
            assert (await rig.get("web.apps.test")).status_code == 200
            assert b" 503 " in await ask(silent, "two"), "it was nobody's until it asked"
        await until(lambda: served(rig, "two.apps.test"), bool, within_s=15, every_s=0.02)


async def test_with_limits_by_connections_a_machine_has_one_for_each_request_and_none_for_idle_clients(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig, contextlib.AsyncExitStack() as clients:
        port = free_port()
        backend = await rig.backend("one", IP, port)
        limits = Concurrency(type="connections", soft_limit=1, hard_limit=1)
        await rig.agent.rows(
            *app_rows("web", HOST),
            service_row(rig.ports, "web", port, concurrency=limits),
            machine_row("web", "m1", IP),
        )
        kept = [await clients.enter_async_context(line(rig.address, rig.ports.http)) for _ in range(3)]
        for client in kept + kept:
            assert b" 200 OK" in await ask(client, "web")
        assert backend.connections == len(kept) * 2


async def ask(client: Any, app: str) -> bytes:
    await client.say(f"GET / HTTP/1.1\r\nHost: {app}.apps.test\r\n\r\n".encode())
    head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 15)
    length = re.search(rb"content-length: (\d+)", head.lower())
    if length:
        await client.hear(int(length[1]))
    return head


async def served(rig: Rig, host: str) -> bool:
    return (await rig.get(host)).status_code == 200


def one_at_a_time(internal_port: int, *ports: Port) -> ServiceRow:
    limits = Concurrency(type="connections", soft_limit=1, hard_limit=1)
    return ServiceRow(
        app="web", protocol="tcp", internal_port=internal_port, ports=[*ports], concurrency=limits, autostart=True
    )


async def queued(rig: Rig, number: int) -> None:
    async def length() -> str:
        return await rig.admin("/metrics") or ""

    wanted = f"pantala_proxy_queue_length {number}\n"
    await until(length, lambda text: wanted in text, within_s=15, every_s=0.02)
