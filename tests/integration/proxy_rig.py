"""A real `pantala-proxy` between a fake agent (the feed's other end) and small backends, all on loopback.

Machines of a rig live on loopback addresses of their own, so that each is a place of its own as behind a host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from pantala.kit import binaries
from pantala.testing.authority import Authority
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import (
    AgentHello,
    AppRow,
    Delta,
    DNSSettings,
    FeedRow,
    HostRow,
    Listener,
    MachineRow,
    ProxyFrame,
    ProxySettings,
    ServiceRow,
    Snapshot,
)
from pantala.wire.machine import Concurrency, Port

WITHIN_S = 15.0


# -- rows --------------------------------------------------------------------------------------------------------


def row(stream: str, key: str, value: msgspec.Struct | dict[str, Any] | None) -> FeedRow:
    return FeedRow(stream=stream, key=key, value=None if value is None else msgspec.to_builtins(value))


def app_rows(app: str, host: str) -> list[FeedRow]:
    return [
        row("routes", f"app/{app}", AppRow(app=app, org="personal", network=1)),
        row("routes", f"host/{host}", HostRow(app=app)),
    ]


def service_row(rig_ports: Ports, app: str, internal_port: int, **changes: Any) -> FeedRow:
    options: dict[str, Any] = {
        "protocol": "tcp",
        "ports": [
            Port(port=rig_ports.http, handlers=["http"]),
            Port(port=rig_ports.https, handlers=["tls", "http"]),
        ],
        "concurrency": Concurrency(type="requests", soft_limit=20, hard_limit=25),
        "autostart": True,
        **changes,
    }
    return row("routes", f"svc/{app}/d1", ServiceRow(app=app, internal_port=internal_port, **options))


def machine_row(app: str, machine: str, ip4: str, state: str = "started", **changes: Any) -> FeedRow:
    options: dict[str, Any] = {
        "region": "iad",
        "node": "n1",
        "instance_id": "01A",
        "generation": 1,
        "services": ["d1"],
        "passing": [True],
        **changes,
    }
    value = MachineRow(id=machine, app=app, state=state, ip4=ip4, ip6="fdaa::2", **options)
    return row("routes", f"m/{machine}", value)


# -- the agent's end of the feed ---------------------------------------------------------------------------------


class FakeAgent:
    """Listens on the feed's socket; keeps the rows, answers a hello with all of them, records what the proxy says."""

    def __init__(self, path: Path, node: str = "n1", region: str = "iad") -> None:
        self._path = path
        self._hello = AgentHello(protocol=1, node=node, region=region)
        self._rows: dict[tuple[str, str], FeedRow] = {}
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.revision = 0
        self.frames: list[ProxyFrame] = []
        self.on_frame: Callable[[ProxyFrame], Awaitable[None]] | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=1 << 24)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            for writer in list(self._writers):
                writer.close()
            await self._server.wait_closed()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def send(self, frame: msgspec.Struct) -> None:
        for writer in list(self._writers):
            writer.write(msgspec.json.encode(frame) + b"\n")
            await writer.drain()

    async def rows(self, *rows: FeedRow) -> None:
        """Kept, and sent as a delta to a proxy that is connected; returns once it was applied."""
        self.revision += 1
        for one in rows:
            if one.value is None:
                self._rows.pop((one.stream, one.key), None)
            else:
                self._rows[one.stream, one.key] = one
        await self.send(Delta(revision=self.revision, rows=list(rows)))
        if self._writers:
            await self.applied()

    async def applied(self) -> list[str]:
        """What the proxy set aside at the present revision."""

        def wanted(frames: list[Any]) -> bool:
            return any(f.revision >= self.revision for f in frames)

        frames = await self.frames_of("Applied", wanted)
        return frames[-1].set_aside

    async def frames_of(self, kind: str, wanted: Callable[[list[Any]], bool] = bool) -> list[Any]:
        async def look() -> list[Any]:
            return [f for f in self.frames if type(f).__name__ == kind]

        return await until(look, wanted, within_s=WITHIN_S, every_s=0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self.send(self._hello)
            rows = list(self._rows.values())
            half = len(rows) // 2
            await self.send(Snapshot(revision=self.revision, rows=rows[:half]))
            await self.send(Snapshot(revision=self.revision, rows=rows[half:], last=True))
            while line := await reader.readline():
                frame = msgspec.json.decode(line, type=ProxyFrame)
                self.frames.append(frame)
                if self.on_frame:
                    await self.on_frame(frame)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


# -- machines ----------------------------------------------------------------------------------------------------


@dataclass
class Request:
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name]
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else None


Handler = Callable[["Backend", Request], Awaitable[bytes]]


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def say_name(backend: Backend, request: Request) -> bytes:
    return answer(backend.name.encode())


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    headers = [(name.lower(), value.strip()) for name, value in (line.split(":", 1) for line in lines)]
    known = dict(headers)
    body = b""
    if known.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).strip(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    elif length := known.get("content-length"):
        body = await reader.readexactly(int(length))
    return Request(method, path, headers, body)


class Backend:
    """An app on a loopback address: HTTP/1.1 with keep-alive, one handler for everything."""

    def __init__(self, name: str, ip: str, port: int, handler: Handler = say_name) -> None:
        self.name, self.ip, self.port, self.handler = name, ip, port, handler
        self.requests: list[Request] = []
        self.connections = 0
        self.busy = 0
        self.busy_max = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.ip, self.port, reuse_address=True)

    async def stop(self) -> None:
        """Like a process that ends: nothing listens, open connections are cut."""
        if self._server:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while request := await read_request(reader):
                self.requests.append(request)
                if request.header("upgrade") == "websocket":
                    await self._echo_websocket(reader, writer)
                    return
                self.busy += 1
                self.busy_max = max(self.busy, self.busy_max)
                try:
                    writer.write(await self.handler(self, request))
                    await writer.drain()
                finally:
                    self.busy -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _echo_websocket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


# -- the proxy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ports:
    http: int = field(default_factory=free_port)
    https: int = field(default_factory=free_port)
    admin: int = field(default_factory=free_port)
    dns: int = field(default_factory=free_port)
    api: int = field(default_factory=free_port)


class Rig:
    """`address` and `ports` are the proxy's; the rigs of one cluster share their ports on addresses of their own."""

    def __init__(
        self,
        folder: Path,
        *,
        node: str = "n1",
        region: str = "iad",
        address: str = "127.0.0.1",
        ports: Ports | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.address = address
        self.ports = ports or Ports()
        self.ca = Authority()
        self.agent = FakeAgent(folder / "agent.sock", node, region)
        self.process: asyncio.subprocess.Process | None = None
        self._backends: list[Backend] = []
        options: dict[str, Any] = {
            "dns": DNSSettings(listen=[], public_listen=[], public_names={}, forward=[]),
            "admin_listen": f"{address}:{self.ports.admin}",
            "drain_max_ms": 5_000,
            **settings,
        }
        listeners = options.pop("more_listeners", [])
        self.settings = ProxySettings(
            node=node,
            region=region,
            state_dir=str(folder / "state"),
            agent_socket=str(folder / "agent.sock"),
            listeners=[
                Listener(address=address, port=self.ports.http, tls=False),
                Listener(address=address, port=self.ports.https, tls=True),
                *listeners,
            ],
            **options,
        )

    async def start(self) -> None:
        file = self.folder / "proxy.json"
        file.write_bytes(msgspec.json.encode(self.settings))
        program = binaries.find("pantala-proxy")
        with (self.folder / "proxy.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                program, "--settings", file, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )

        async def healthy() -> bool:
            assert self.process is not None
            assert self.process.returncode is None, (self.folder / "proxy.log").read_text()
            return await self.admin("/healthz") is not None

        await until(healthy, bool, within_s=WITHIN_S, every_s=0.02)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(how)
        code = await asyncio.wait_for(self.process.wait(), WITHIN_S)
        self.process = None
        return code

    async def admin(self, path: str) -> str | None:
        try:
            async with httpx2.AsyncClient(trust_env=False) as client:
                return (await client.get(f"http://{self.address}:{self.ports.admin}{path}")).text
        except httpx2.TransportError:
            return None

    async def snapshot(self) -> dict[str, Any]:
        return json.loads(await self.admin("/snapshot") or "{}")

    async def agent_asked_for_a_wake(self) -> bool:
        return any(type(frame).__name__ == "Wake" for frame in self.agent.frames)

    async def backend(self, name: str, ip: str, port: int, handler: Handler = say_name) -> Backend:
        backend = Backend(name, ip, port, handler)
        self._backends.append(backend)
        await backend.start()
        return backend

    async def close(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.agent.stop()
        for backend in self._backends:
            await backend.stop()

    # -- clients

    def client(self, host: str, *, http2: bool = False) -> httpx2.AsyncClient:
        """For one host name over TLS, resolved to the proxy."""
        url = f"https://{self.address}:{self.ports.https}"
        return httpx2.AsyncClient(
            base_url=url,
            headers={"host": f"{host}:{self.ports.https}"},
            verify=self.ca.context(),
            http1=not http2,
            http2=http2,
            trust_env=False,
            timeout=WITHIN_S,
            limits=httpx2.Limits(max_connections=200, max_keepalive_connections=100),
        )

    async def get(self, host: str, path: str = "/", **headers: str) -> httpx2.Response:
        """Over plain HTTP, on a connection of its own."""
        async with httpx2.AsyncClient(trust_env=False, verify=False, timeout=WITHIN_S) as client:
            return await client.get(
                f"http://{self.address}:{self.ports.http}{path}",
                headers={"host": f"{host}:{self.ports.http}", **headers},
            )

    async def raw(self, request: bytes) -> bytes:
        """Bytes as they are, until the proxy closes."""
        reader, writer = await asyncio.open_connection(self.address, self.ports.http)
        try:
            writer.write(request)
            await writer.drain()
            return await asyncio.wait_for(reader.read(), WITHIN_S)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncGenerator[Rig]:
    rig = Rig(folder, **settings)
    await rig.agent.start()
    try:
        await rig.start()
        await rig.agent.applied()
        yield rig
    finally:
        await rig.close()


def json_of(response: httpx2.Response) -> Mapping[str, Any]:
    return json.loads(response.text)
