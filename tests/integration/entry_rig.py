"""A real proxy whose transparent sockets are connected to directly: what a firewall would bring, at the address and
port that the test connects to. `SHARED` belongs to nobody, `DEDICATED` to the app `web`; both have all of `Doors`."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy_rig import WITHIN_S, Rig, app_rows, machine_row, row, running

from pantala.testing.ports import free_port
from pantala.wire.feed import AddressRow, FeedRow, ServiceRow
from pantala.wire.machine import Concurrency, Port, ProxyProtoOptions, TLSOptions

NAME = "web.apps.test"
SHARED = "127.0.0.1"
DEDICATED = "127.0.9.1"
MACHINE = "127.0.9.100"


class Told:
    """An app that reads bytes: keeps what each connection said, answers it in capitals, and says bye at its end."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.port = free_port()
        self._server: asyncio.Server | None = None

    async def start(self, ip: str = MACHINE) -> None:
        self._server = await asyncio.start_server(self._serve, ip, self.port)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at = len(self.heard)
        self.heard.append(b"")
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.heard[at] += data
                writer.write(data.upper())
                await writer.drain()
            writer.write(b"BYE")
            writer.close()
            await writer.wait_closed()


@dataclass(frozen=True)
class Doors:
    """A port of each kind."""

    raw: int = field(default_factory=free_port)
    mqtt: int = field(default_factory=free_port)
    postgres: int = field(default_factory=free_port)
    text: int = field(default_factory=free_port)
    binary: int = field(default_factory=free_port)
    https: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)
    unused: int = field(default_factory=free_port)

    def all(self) -> list[int]:
        return [self.raw, self.mqtt, self.postgres, self.text, self.binary, self.https, self.http, self.unused]

    def services(self) -> list[Port]:
        second = ProxyProtoOptions(version="v2")
        return [
            Port(port=self.raw),
            Port(port=self.mqtt, handlers=["tls"], tls_options=TLSOptions(alpn=["mqtt"], versions=["TLSv1.3"])),
            Port(port=self.postgres, handlers=["pg_tls"]),
            Port(port=self.text, handlers=["proxy_proto"]),
            Port(port=self.binary, handlers=["proxy_proto", "tls"], proxy_proto_options=second),
            Port(port=self.https, handlers=["http", "tls"]),
            Port(port=self.http, handlers=["edge_http"], force_https=True),
        ]


@dataclass
class EntryRig:
    rig: Rig
    doors: Doors
    app: Told

    @property
    def ca(self) -> Any:
        return self.rig.ca

    async def rows(self, *rows: FeedRow) -> None:
        await self.rig.agent.rows(*rows)

    async def logged(self, code: str, times: int = 1) -> str:
        """The newest line of that code in the app's log, once there are so many."""

        def enough(frames: list[Any]) -> bool:
            return sum(f.code == code and f.app == "web" for f in frames) >= times

        frames = await self.rig.agent.frames_of("ProxyLog", enough)
        return [f.message for f in frames if f.code == code][-1]


@contextlib.asynccontextmanager
async def entry_rig(folder: Path, **settings: Any) -> AsyncGenerator[EntryRig]:
    doors, app = Doors(), Told()
    listen = [f"{ip}:{port}" for ip in (SHARED, DEDICATED) for port in doors.all()]
    async with running(folder, entry_listen=listen, **settings) as rig:
        await app.start()
        try:
            service = ServiceRow(
                app="web",
                protocol="tcp",
                internal_port=app.port,
                ports=doors.services(),
                concurrency=Concurrency(type="connections", soft_limit=100, hard_limit=200),
            )
            await rig.agent.rows(
                *app_rows("web", NAME),
                row("routes", "svc/web/d1", service),
                machine_row("web", "m1", MACHINE),
                row("routes", f"addr/{DEDICATED}", AddressRow(kind="dedicated", app="web")),
                row("certs", "cert/web", rig.ca.issue(NAME)),
            )
            yield EntryRig(rig, doors, app)
        finally:
            await app.stop()


class Line:
    """A client's connection, plain or with TLS from a moment on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @property
    def sockname(self) -> tuple[str, int]:
        return self.writer.get_extra_info("sockname")[:2]

    @property
    def tls(self) -> ssl.SSLObject:
        return self.writer.get_extra_info("ssl_object")

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hear(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), WITHIN_S)

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), WITHIN_S)

    async def start_tls(self, context: ssl.SSLContext, name: str | None) -> None:
        await asyncio.wait_for(self.writer.start_tls(context, server_hostname=name), WITHIN_S)


@contextlib.asynccontextmanager
async def line(ip: str, port: int, **tls: Any) -> AsyncGenerator[Line]:
    """`tls`: ssl and server_hostname, as asyncio takes them."""
    connection = await asyncio.wait_for(asyncio.open_connection(ip, port, **tls), WITHIN_S)
    try:
        yield Line(*connection)
    finally:
        connection[1].close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await asyncio.wait_for(connection[1].wait_closed(), WITHIN_S)
