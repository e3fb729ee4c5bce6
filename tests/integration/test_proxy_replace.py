"""A running proxy gives way to a new process: no request is lost, limits hold over both, and a new one that does not
come up changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded, StreamReset
from proxy_rig import WITHIN_S, Backend, Request, Rig, answer, app_rows, machine_row, row, running
from proxy_rig import service_row as service

from pantala.host.replacing import listener_pid
from pantala.kit import binaries
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import Load
from pantala.wire.machine import Concurrency

pytestmark = pytest.mark.anyio
HOST = "web.apps.test"
IP = "127.0.6.2"
REPLACEMENTS = 10
EACH_CLIENT_EVERY_S = 0.02
PART = bytes(1024)
GOAWAY = 7


class Replaced:
    """A rig whose proxy is replaced; `old` are those before, newest last."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.old: list[asyncio.subprocess.Process] = []

    async def start(self, *more: str, settings: Path | None = None) -> asyncio.subprocess.Process:
        file = settings or self.rig.folder / "proxy.json"
        with (self.rig.folder / "proxy.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                binaries.find("pantala-proxy"), "--settings", file, *more, stdout=log, stderr=log
            )

    async def replace(self) -> None:
        """Returns once the new process serves; the old one goes on until it is empty."""
        new = await self.start("--replace")
        assert self.rig.process is not None
        self.old.append(self.rig.process)
        self.rig.process = new

        async def serves() -> bool:
            assert new.returncode is None, self.log()
            return self.serving() == new.pid

        await until(serves, bool, within_s=WITHIN_S, every_s=0.01)

    def serving(self) -> int:
        return listener_pid(self.rig.folder / "state" / "replace.sock")

    def log(self) -> str:
        return (self.rig.folder / "proxy.log").read_text()

    async def close(self) -> None:
        for process in self.old:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.fixture
async def replaced(tmp_path: Path) -> AsyncIterator[Replaced]:
    async with running(tmp_path, drain_max_ms=20_000) as rig:
        made = Replaced(rig)
        try:
            await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
            yield made
        finally:
            await made.close()


async def web(rig: Rig, handler: Callable[[Backend, Request], Awaitable[bytes]], hard: int = 1000) -> Backend:
    port = free_port()
    backend = await rig.backend("web", IP, port, handler)
    limits = Concurrency(type="requests", soft_limit=min(hard, 500), hard_limit=hard)
    rows = [*app_rows("web", HOST), service(rig.ports, "web", port, concurrency=limits), machine_row("web", "m1", IP)]
    await rig.agent.rows(*rows)
    return backend


async def say_path(backend: Backend, request: Request) -> bytes:
    return answer(request.path.encode())


# -- load --------------------------------------------------------------------------------------------------------


@dataclass
class Clients:
    """Clients that never repeat a request: each one that is not answered as it should be is lost."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, name: str, ask: Callable[[str], Awaitable[str]]) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            path = f"/{name}/{number}"
            try:
                said = await ask(path)
            except Exception as error:  # noqa: BLE001 - however it fails, it is lost
                self.lost.append(f"{path}: {error!r}")
            else:
                self.answered += 1
                if said != path:
                    self.lost.append(f"{path}: {said}")
            await asyncio.sleep(EACH_CLIENT_EVERY_S)


class OverTwo:
    """One request after the other on a kept connection of HTTP/2. A GOAWAY is heeded between two of them; h2 itself
    would take the connection for closed, so it does not get to see it."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._leave = False
        self.connections = 0

    async def ask(self, path: str) -> str:
        if self._leave or self._streams is None:
            await self._connect()
        stream = self._two.get_next_available_stream_id()
        head = [(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", path)]
        self._two.send_headers(stream, head, end_stream=True)
        return await asyncio.wait_for(self._answer(), WITHIN_S)

    async def _answer(self) -> str:
        assert self._streams is not None
        reader, writer = self._streams
        body = b""
        while True:
            writer.write(self._two.data_to_send())
            head = await reader.readexactly(9)
            frame = head + await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == GOAWAY:
                self._leave = True
                continue
            for event in self._two.receive_data(frame):
                if isinstance(event, DataReceived):
                    body += event.data or b""
                elif isinstance(event, StreamReset | StreamEnded):
                    assert isinstance(event, StreamEnded), "the stream was reset"
                    return body.decode()

    async def _connect(self) -> None:
        self.close()
        tls = self._rig.ca.context("h2")
        port = self._rig.ports.https
        self._streams = await asyncio.open_connection(self._rig.address, port, ssl=tls, server_hostname=HOST)
        self._two = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._two.initiate_connection()
        self._leave = False
        self.connections += 1

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


@contextlib.asynccontextmanager
async def under_load(rig: Rig, *, more: int = 0) -> AsyncGenerator[Clients]:
    load = Clients()
    async with contextlib.AsyncExitStack() as clients, asyncio.TaskGroup() as tasks:
        kept = await clients.enter_async_context(rig.client(HOST))
        two = clients.enter_context(contextlib.closing(OverTwo(rig)))

        async def over_kept(path: str) -> str:
            return (await kept.get(path, extensions={"sni_hostname": HOST})).text

        async def over_new(path: str) -> str:
            head = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
            return (await rig.raw(head.encode())).partition(b"\r\n\r\n")[2].decode()

        for number in range(2 + more):
            tasks.create_task(load.run(f"kept{number}", over_kept))
            tasks.create_task(load.run(f"new{number}", over_new))
        tasks.create_task(load.run("two", two.ask))
        try:
            yield load
        finally:
            load.stop.set()


async def test_ten_replacements_lose_nothing(replaced: Replaced) -> None:
    rig = replaced.rig
    await web(rig, say_path)
    async with under_load(rig) as load:
        for _ in range(REPLACEMENTS):
            answered = load.answered
            await replaced.replace()
            await until(lambda seen=answered: more(load, seen + 25), bool, within_s=WITHIN_S, every_s=0.01)
        for process in replaced.old:  # while the clients go on: what is kept open is closed, with nothing under way
            assert await asyncio.wait_for(process.wait(), WITHIN_S) == 0
    assert load.lost == []
    assert await rig.stop() == 0


async def more(load: Clients, number: int) -> bool:
    return load.answered >= number


# -- what takes long ---------------------------------------------------------------------------------------------


async def test_a_websocket_and_a_download_live_through_it_and_drain_max_ends_with_1012(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def slow(backend: Backend, request: Request) -> bytes:
        await go_on.wait()
        return answer(PART * 2048)

    async with running(tmp_path, drain_max_ms=4_000) as rig:
        replaced = Replaced(rig)
        try:
            await web(rig, slow)
            reader, writer = await open_websocket(rig)
            download = asyncio.create_task(rig.get(HOST, "/long"))
            await until(lambda: in_flight(rig, 2), bool, within_s=WITHIN_S, every_s=0.01)
            await replaced.replace()
            writer.write(b"\x81\x80\x00\x00\x00\x00")
            assert await asyncio.wait_for(reader.readexactly(6), WITHIN_S) == b"\x81\x80\x00\x00\x00\x00"
            go_on.set()
            assert len((await download).content) == len(PART) * 2048
            left = await asyncio.wait_for(reader.read(), WITHIN_S)
            assert left.startswith(b"\x88\x02" + (1012).to_bytes(2, "big")), left
            writer.close()
            assert await asyncio.wait_for(replaced.old[0].wait(), WITHIN_S) == 0
        finally:
            await replaced.close()


async def open_websocket(rig: Rig) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(rig.address, rig.ports.http)
    writer.write(
        f"GET /ws HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WITHIN_S)
    assert head.startswith(b"HTTP/1.1 101"), head
    return reader, writer


async def in_flight(rig: Rig, number: int) -> bool:
    loads = [frame for frame in rig.agent.frames if isinstance(frame, Load)]
    return bool(loads) and sum(load.in_flight for load in loads[-1].machines) == number


# -- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True], ids=["drained", "killed"])
async def test_a_hard_limit_holds_over_both(replaced: Replaced, killed: bool) -> None:
    rig, go_on = replaced.rig, asyncio.Event()

    async def held(backend: Backend, request: Request) -> bytes:
        if request.path == "/held":
            await go_on.wait()
        return answer(b"done")

    backend = await web(rig, held, hard=2)
    head = f"GET /held HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
    first = [asyncio.create_task(rig.raw(head)) for _ in range(2)]
    await until(lambda: in_flight(rig, 2), bool, within_s=WITHIN_S, every_s=0.01)
    await replaced.replace()
    second = asyncio.create_task(rig.get(HOST, "/"))
    await until(lambda: queued(rig, 1), bool, within_s=WITHIN_S, every_s=0.01)
    assert not any(request.path == "/" for request in backend.requests)
    if killed:
        replaced.old[0].kill()
    else:
        go_on.set()
    assert (await second).text == "done"
    assert backend.busy_max <= 2 or killed
    go_on.set()
    ends = await asyncio.gather(*first, return_exceptions=True)
    assert killed or all(isinstance(end, bytes) and end.endswith(b"done") for end in ends)


async def test_a_limit_of_one_is_never_passed(replaced: Replaced) -> None:
    """By clients that keep their connections to the old process, over HTTP/1 and 2, and new ones."""
    rig = replaced.rig

    async def works(backend: Backend, request: Request) -> bytes:
        await asyncio.sleep(0.002)
        return answer(request.path.encode())

    backend = await web(rig, works, hard=1)
    async with under_load(rig, more=4) as load:
        for _ in range(REPLACEMENTS):
            answered = load.answered
            await replaced.replace()
            await until(lambda seen=answered: more(load, seen + 50), bool, within_s=WITHIN_S, every_s=0.01)
    assert load.lost == []
    assert backend.busy_max == 1


async def test_who_stands_in_line_at_the_old_one_is_served_in_turn(replaced: Replaced) -> None:
    rig, gate = replaced.rig, asyncio.Semaphore(0)

    async def gated(backend: Backend, request: Request) -> bytes:
        await gate.acquire()
        return answer(request.path.encode())

    backend = await web(rig, gated, hard=1)
    asked: list[asyncio.Task[httpx2.Response]] = []
    for number in range(3):  # the first is in flight, the others wait at the old one
        asked.append(asyncio.create_task(rig.get(HOST, f"/{number}")))
        await until(lambda: waiting(rig, len(asked) - 1), bool, within_s=WITHIN_S, every_s=0.01)
        await until(lambda: in_flight(rig, 1), bool, within_s=WITHIN_S, every_s=0.01)
    await replaced.replace()
    await until(lambda: waiting(rig, 2), bool, within_s=WITHIN_S, every_s=0.01)
    asked.append(asyncio.create_task(rig.get(HOST, "/3")))
    await until(lambda: waiting(rig, 3), bool, within_s=WITHIN_S, every_s=0.01)
    for _ in asked:
        gate.release()
    assert [(await one).text for one in asked] == [f"/{number}" for number in range(4)]
    assert [request.path for request in backend.requests] == [f"/{number}" for number in range(4)]
    assert backend.busy_max == 1


async def waiting(rig: Rig, number: int) -> bool:
    return f"\npantala_proxy_waiting {number}\n" in (await rig.admin("/metrics") or "")


async def test_a_new_one_that_dies_leaves_the_old_one_its_limits(replaced: Replaced) -> None:
    rig, gate = replaced.rig, asyncio.Semaphore(0)

    async def gated(backend: Backend, request: Request) -> bytes:
        await gate.acquire()
        return answer(request.path.encode())

    backend = await web(rig, gated, hard=1)
    streams = [await asyncio.open_connection(rig.address, rig.ports.http) for _ in range(2)]
    for reader, writer in streams:  # kept by the old one
        writer.write(f"GET /before HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        gate.release()
        assert (await asyncio.wait_for(reader.readuntil(b"/before"), WITHIN_S)).startswith(b"HTTP/1.1 200")
    await replaced.replace()
    for number, (_, writer) in enumerate(streams):
        writer.write(f"GET /{number} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    await until(lambda: waiting(rig, 1), bool, within_s=WITHIN_S, every_s=0.01)
    assert rig.process is not None
    rig.process.kill()
    await rig.process.wait()
    gate.release()
    gate.release()
    for reader, writer in streams:
        assert b" 200 OK" in await asyncio.wait_for(reader.read(), WITHIN_S)
        writer.close()
    assert sorted(request.path for request in backend.requests)[:2] == ["/0", "/1"]
    assert backend.busy_max == 1


async def queued(rig: Rig, number: int) -> bool:
    return f"\npantala_proxy_queue_length {number}\n" in (await rig.admin("/metrics") or "")


# -- new ones that do not come up --------------------------------------------------------------------------------


async def test_one_that_fails_changes_nothing(replaced: Replaced) -> None:
    rig = replaced.rig
    await web(rig, say_path)
    assert rig.process is not None
    pid = rig.process.pid
    bad = rig.folder / "bad.json"
    bad.write_text((rig.folder / "proxy.json").read_text().replace("127.0.0.1", "192.0.2.1"))
    async with under_load(rig) as load:
        failed = await replaced.start("--replace", settings=bad)
        assert await asyncio.wait_for(failed.wait(), WITHIN_S) == 1
        assert "cannot listen on 192.0.2.1" in replaced.log()
        await until(lambda: said(replaced, 1), bool, within_s=WITHIN_S, every_s=0.01)  # or one is under way still
        with contextlib.closing(asking(rig)):  # a new one that got the sockets and died: this process plays it
            refused = await replaced.start("--replace")
            assert await asyncio.wait_for(refused.wait(), WITHIN_S) == 1
            assert "another process is being started to replace this proxy" in replaced.log()
        answered = load.answered
        await until(lambda: more(load, answered + 25), bool, within_s=WITHIN_S, every_s=0.01)
        assert replaced.serving() == pid
        await until(lambda: said(replaced, 2), bool, within_s=WITHIN_S, every_s=0.01)
        await replaced.replace()
    assert load.lost == []


async def said(replaced: Replaced, times: int) -> bool:
    return replaced.log().count("replacement failed; this proxy goes on") >= times


def asking(rig: Rig) -> socket.socket:
    new = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    new.settimeout(WITHIN_S)
    new.connect(str(rig.folder / "state" / "replace.sock"))
    new.send(b'{"type": "ask", "pid": 1, "version": "test"}')
    assert b"sockets" in new.recv(65536)
    return new


async def test_nobody_to_replace(replaced: Replaced) -> None:
    assert await replaced.rig.stop(signal.SIGKILL) == -signal.SIGKILL
    alone = await replaced.start("--replace")
    assert await asyncio.wait_for(alone.wait(), WITHIN_S) == 1
    assert "no proxy to replace" in replaced.log()
    await replaced.rig.start()  # over the socket that the killed one left
    assert replaced.rig.process is not None
    assert replaced.serving() == replaced.rig.process.pid
