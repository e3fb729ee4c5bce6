"""The proxy's DNS as machines and a box's resolver ask it, and its door to the API."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from proxy_rig import Rig, answer, running

from pantala.testing.ports import free_port
from pantala.wire.feed import DNSSettings

pytestmark = pytest.mark.anyio
A, TXT, AAAA = 1, 16, 28
NOERROR, SERVFAIL, NXDOMAIN, REFUSED = 0, 2, 3, 5
MACHINES, BOX = "127.0.3.1", "127.0.3.2"


def query(name: str, kind: int, number: int = 7) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)


def read(message: bytes) -> tuple[int, list[tuple[int, bytes]], bool]:
    """Code, answers as (TTL, data), truncated. Names of answers are pointers, as hickory and the fake write them."""
    _, flags, _, answers, _, _ = struct.unpack("!6H", message[:12])
    at = 12
    while message[at]:
        at += 1 + message[at]
    at += 5
    found: list[tuple[int, bytes]] = []
    for _ in range(answers):
        assert message[at] & 0xC0 == 0xC0
        _, _, ttl, length = struct.unpack("!2HIH", message[at + 2 : at + 12])
        found.append((ttl, message[at + 12 : at + 12 + length]))
        at += 12 + length
    return flags & 15, found, bool(flags & 0x0200)


class Asker(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.answers.put_nowait(data)


@asynccontextmanager
async def asking(address: str, port: int) -> AsyncGenerator[tuple[asyncio.DatagramTransport, Asker]]:
    loop = asyncio.get_running_loop()
    transport, asker = await loop.create_datagram_endpoint(Asker, remote_addr=(address, port))
    try:
        yield transport, asker
    finally:
        transport.close()


async def ask(rig: Rig, address: str, name: str, kind: int) -> tuple[int, list[tuple[int, bytes]], bool]:
    async with asking(address, rig.settings.dns.port) as (transport, asker):
        transport.sendto(query(name, kind))
        return read(await asyncio.wait_for(asker.answers.get(), 10))


async def ask_tcp(rig: Rig, address: str, name: str, kind: int) -> tuple[int, list[tuple[int, bytes]], bool]:
    reader, writer = await asyncio.open_connection(address, rig.settings.dns.port)
    try:
        message = query(name, kind)
        writer.write(struct.pack("!H", len(message)) + message)
        (length,) = struct.unpack("!H", await asyncio.wait_for(reader.readexactly(2), 10))
        return read(await reader.readexactly(length))
    finally:
        writer.close()


class Resolver(asyncio.DatagramProtocol):
    """Knows one address for everything; over UDP it says that names beginning with `big` do not fit."""

    def __init__(self) -> None:
        self.asked = 0
        self.transport: asyncio.DatagramTransport | None = None

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self.transport is not None
        self.transport.sendto(self.answer(data, truncate=data[13:16] == b"big"), addr)

    def answer(self, message: bytes, *, truncate: bool = False, count: int = 1) -> bytes:
        self.asked += 1
        (number,) = struct.unpack("!H", message[:2])
        flags = 0x8380 if truncate else 0x8180
        record = b"\xc0\x0c" + struct.pack("!2HIH", A, 1, 60, 4) + bytes([192, 0, 2, 1])
        count = 0 if truncate else count
        return struct.pack("!6H", number, flags, 1, count, 0, 0) + message[12:] + record * count

    async def serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        whole = self.answer(await reader.readexactly(length), count=100)
        writer.write(struct.pack("!H", len(whole)) + whole)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def dns(folder: Path, *, rate: int = 200) -> AsyncGenerator[tuple[Rig, Resolver]]:
    port = free_port()
    loop = asyncio.get_running_loop()
    transport, resolver = await loop.create_datagram_endpoint(Resolver, local_addr=("127.0.0.1", port))
    resolver.transport = transport
    server = await asyncio.start_server(resolver.serve_tcp, "127.0.0.1", port)
    settings = DNSSettings(
        listen=[MACHINES],
        public_listen=[BOX],
        public_names={"apps.pantala.test": "10.0.0.1", "six.pantala.test": "fd00::1"},
        forward=[f"127.0.0.1:{port}"],
        port=free_port(),
        queries_per_s_max=rate,
    )
    try:
        async with running(folder, dns=settings) as rig:
            yield rig, resolver
    finally:
        transport.close()
        server.close()
        await server.wait_closed()


async def test_private_names_are_answered_here(tmp_path: Path) -> None:
    api = (5, bytes.fromhex("fdaa" + "00" * 13 + "03"))
    async with dns(tmp_path) as (rig, resolver):
        for how in (ask, ask_tcp):
            assert await how(rig, MACHINES, "_api.internal", AAAA) == (NOERROR, [api], False)
            assert await how(rig, MACHINES, "_api.internal", A) == (NOERROR, [], False)
            assert await how(rig, MACHINES, "web.internal", AAAA) == (NXDOMAIN, [], False)
        assert resolver.asked == 0


async def test_public_names_are_forwarded(tmp_path: Path) -> None:
    async with dns(tmp_path) as (rig, resolver):
        code, answers, _ = await ask(rig, MACHINES, "example.com", A)
        assert (code, answers) == (NOERROR, [(60, bytes([192, 0, 2, 1]))])
        assert resolver.asked == 1
        code, answers, truncated = await ask(rig, MACHINES, "big.example.com", A)
        assert (code, answers, truncated) == (NOERROR, [], True)
        code, answers, truncated = await ask_tcp(rig, MACHINES, "big.example.com", A)
        assert (code, len(answers), truncated) == (NOERROR, 100, False)


async def test_the_box_answers_its_own_names_and_nothing_else(tmp_path: Path) -> None:
    async with dns(tmp_path) as (rig, resolver):
        ten = (NOERROR, [(5, bytes([10, 0, 0, 1]))], False)
        assert await ask(rig, BOX, "web.apps.pantala.test", A) == ten
        assert await ask(rig, BOX, "apps.pantala.test", A) == ten
        assert await ask(rig, BOX, "web.apps.pantala.test", AAAA) == (NOERROR, [], False)
        assert (await ask(rig, BOX, "x.six.pantala.test", AAAA))[1][0][1][:2] == bytes.fromhex("fd00")
        for name in ("example.com", "_api.internal", "pantala.test"):
            assert await ask(rig, BOX, name, A) == (REFUSED, [], False)
        assert resolver.asked == 0


async def test_an_asker_has_a_rate_and_the_others_do_not_notice(tmp_path: Path) -> None:
    async with dns(tmp_path, rate=5) as (rig, _):
        async with asking(MACHINES, rig.settings.dns.port) as (transport, asker):
            for number in range(20):
                transport.sendto(query("_api.internal", AAAA, number))
            codes = [read(await asyncio.wait_for(asker.answers.get(), 10))[0] for _ in range(20)]
        assert codes.count(REFUSED) >= 10
        assert codes.count(NOERROR) >= 5


async def test_a_resolver_that_is_away_gives_servfail(tmp_path: Path) -> None:
    settings = DNSSettings(listen=[MACHINES], public_listen=[], public_names={}, forward=[], port=free_port())
    async with running(tmp_path, dns=settings) as rig:
        assert await ask(rig, MACHINES, "example.com", A) == (SERVFAIL, [], False)


async def test_the_door_to_the_api(tmp_path: Path) -> None:
    upstream, door = free_port(), free_port()
    async with running(tmp_path, api_forward=f"127.0.0.1:{upstream}", api_listen=[f"127.0.0.1:{door}"]) as rig:
        await rig.backend("api", "127.0.0.1", upstream)
        reader, writer = await asyncio.open_connection("127.0.0.1", door)
        writer.write(b"GET /v1 HTTP/1.1\r\nHost: _api.internal:4280\r\n\r\n")
        wanted = answer(b"api")
        assert await asyncio.wait_for(reader.readexactly(len(wanted)), 10) == wanted
        writer.close()


async def test_a_settings_file_that_is_wrong_names_the_field(tmp_path: Path) -> None:
    rig = Rig(tmp_path, admin_listen="here")
    with pytest.raises(AssertionError, match=r"admin_listen: \"here\" is not ip:port"):
        await rig.start()
    assert rig.process is not None
    assert await rig.process.wait() == 1
