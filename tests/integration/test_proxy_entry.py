"""Where a connection enters and what it speaks: every handler, at an address of the app's own and at a shared one."""

from __future__ import annotations

import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from entry_rig import DEDICATED, NAME, SHARED, EntryRig, Told, entry_rig, line
from mesh_rig import cluster
from proxy_rig import machine_row, row

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import ServiceRow
from pantala.wire.machine import Concurrency, Port, ProxyProtoOptions

pytestmark = pytest.mark.anyio

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
GSS_REQUEST = bytes.fromhex("0000000804d21630")
SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[EntryRig]:
    async with entry_rig(tmp_path) as rig:
        yield rig


async def test_raw_bytes_pass_and_one_direction_may_end_first(rig: EntryRig) -> None:
    async with line(DEDICATED, rig.doors.raw) as client:
        await client.say(b"hello")
        assert await client.hear(5) == b"HELLO"
        await client.say(b"x" * 300_000)
        assert await client.hear(300_000) == b"X" * 300_000
        client.writer.write_eof()
        assert await client.rest() == b"BYE"


@pytest.mark.parametrize(("ip", "port"), [(DEDICATED, "unused"), (SHARED, "raw")])
async def test_a_port_that_nobody_serves_is_closed_after_the_accept(rig: EntryRig, ip: str, port: str) -> None:
    async with line(ip, getattr(rig.doors, port)) as client:
        if ip == SHARED:  # only a name could tell the app, and this is none
            client.writer.write_eof()
        assert await client.rest() == b""
    assert rig.app.heard == []


@pytest.mark.parametrize("ip", [SHARED, DEDICATED])
async def test_tls_ends_here_with_the_protocol_of_the_port(rig: EntryRig, ip: str) -> None:
    context = rig.ca.context("mqtt")
    async with line(ip, rig.doors.mqtt, ssl=context, server_hostname=NAME) as client:
        assert (client.tls.selected_alpn_protocol(), client.tls.version()) == ("mqtt", "TLSv1.3")
        await client.say(b"connect")
        assert await client.hear(7) == b"CONNECT"
    assert rig.app.heard == [b"connect"]


async def test_what_a_port_does_not_offer_is_refused(rig: EntryRig) -> None:
    old = rig.ca.context("mqtt")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (old, rig.ca.context("h2")):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with line(SHARED, rig.doors.mqtt, ssl=context, server_hostname=NAME):
                pass
    assert "handshake failed" in await rig.logged("PT04")
    # A port that speaks no TLS is not reached by a name.
    with pytest.raises((ssl.SSLError, ConnectionError)):
        async with line(SHARED, rig.doors.raw, ssl=rig.ca.context(), server_hostname=NAME):
            pass
    assert rig.app.heard == []


async def test_plain_http_on_a_tls_port_is_told_so(rig: EntryRig) -> None:
    for port in (rig.doors.https, rig.rig.ports.https):
        async with line(DEDICATED if port == rig.doors.https else SHARED, port) as client:
            await client.say(b"GET / HTTP/1.1\r\nHost: web.apps.test\r\n\r\n")
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"https://" in answer
    async with line(DEDICATED, rig.doors.mqtt) as client:
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        client.writer.write_eof()
        assert await client.rest() == b""
    assert "TLS" in await rig.logged("PT04")


async def test_http_and_https_on_ports_of_an_address(rig: EntryRig) -> None:
    async with line(DEDICATED, rig.doors.http) as client:
        await client.say(b"GET /a HTTP/1.1\r\nHost: any.test\r\nConnection: close\r\n\r\n")
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 301 ")
    context = rig.ca.context("h2", "http/1.1")
    for ip in (SHARED, DEDICATED):
        async with line(ip, rig.doors.https, ssl=context, server_hostname=NAME) as client:
            assert client.tls.selected_alpn_protocol() == "h2"


@pytest.mark.parametrize("port", ["text", "binary"])
async def test_the_app_is_told_who_calls(rig: EntryRig, port: str) -> None:
    number = getattr(rig.doors, port)
    tls = {} if port == "text" else {"ssl": rig.ca.context(), "server_hostname": NAME}
    async with line(DEDICATED, number, **tls) as client:
        await client.say(b"~")
        assert (await client.reader.readuntil(b"~")).endswith(b"~")
        ip, source = client.sockname
    if port == "text":
        wanted = f"PROXY TCP4 {ip} {DEDICATED} {source} {number}\r\n".encode()
    else:
        addresses = bytes(map(int, f"{ip}.{DEDICATED}".split(".")))
        wanted = SIGNATURE + b"\x21\x11\x00\x0c" + addresses + struct.pack(">HH", source, number)
    assert rig.app.heard == [wanted + b"~"]


async def test_the_app_behind_another_host_is_told_who_calls_its_edge(tmp_path: Path) -> None:
    door, address, told = free_port(), "127.0.9.1", Told()
    async with cluster(tmp_path, "iad", "lhr", each=[{"entry_listen": [f"{address}:{door}"]}, {}]) as made:
        there = made.hosts[1]
        await told.start(there.machines)
        try:
            options = ProxyProtoOptions(version="v2")
            service = ServiceRow(
                app="web",
                protocol="tcp",
                internal_port=told.port,
                ports=[Port(port=door, handlers=["proxy_proto"], proxy_proto_options=options)],
                concurrency=Concurrency(),
            )
            await made.web(told.port, made.machine(there, "m1"))
            dedicated = row("routes", f"addr/{address}", {"kind": "dedicated", "app": "web"})
            await made.rows(row("routes", "svc/web/d1", service), dedicated)
            async with line(address, door) as client:
                await client.say(b"~")
                await client.reader.readuntil(b"~")
                ip, source = client.sockname
                client.writer.write_eof()
                assert await client.rest() == b"BYE"
        finally:
            await told.stop()
    ends = bytes(map(int, f"{ip}.{address}".split("."))) + struct.pack(">HH", source, door)
    assert told.heard == [SIGNATURE + b"\x21\x11\x00\x0c" + ends + b"~"]


# -- Postgres ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ip", [SHARED, DEDICATED])
@pytest.mark.parametrize("asks_gss", [False, True], ids=["ssl", "gss first"])
async def test_postgres_asks_for_tls(rig: EntryRig, ip: str, *, asks_gss: bool) -> None:
    async with line(ip, rig.doors.postgres) as client:
        if asks_gss:
            await client.say(GSS_REQUEST)
            assert await client.hear(1) == b"N"
        await client.say(SSL_REQUEST)
        assert await client.hear(1) == b"S"
        await client.start_tls(rig.ca.context("postgresql"), NAME)
        await client.say(b"startup")
        assert await client.hear(7) == b"STARTUP"
    assert rig.app.heard == [b"startup"]


async def test_newer_postgres_clients_begin_with_tls(rig: EntryRig) -> None:
    context = rig.ca.context("postgresql")
    async with line(SHARED, rig.doors.postgres, ssl=context, server_hostname=NAME) as client:
        assert client.tls.selected_alpn_protocol() == "postgresql"
        await client.say(b"startup")
        assert await client.hear(7) == b"STARTUP"


async def test_postgres_without_tls_is_refused_in_its_own_words(rig: EntryRig) -> None:
    startup = struct.pack(">II", 20, 196608) + b"user\0joe\0\0\0\0"
    async with line(DEDICATED, rig.doors.postgres) as client:
        await client.say(startup)
        error = await client.rest()
    assert error[:1] == b"E"
    assert struct.unpack(">I", error[1:5])[0] == len(error) - 1
    fields = error[5:].rstrip(b"\0").split(b"\0")
    assert fields[:3] == [b"SFATAL", b"VFATAL", b"C28000"]
    assert b"sslmode" in fields[3]
    assert rig.app.heard == []
    assert "sslmode" in await rig.logged("PT04")


async def test_bytes_behind_the_question_are_no_part_of_what_follows(rig: EntryRig) -> None:
    async with line(DEDICATED, rig.doors.postgres) as client:
        await client.say(SSL_REQUEST + b"injected")
        assert (await client.rest())[:1] == b"S"
    assert rig.app.heard == []


# -- raw TCP and machines -----------------------------------------------------------------------------------------


async def test_another_machine_takes_what_the_first_refuses(rig: EntryRig) -> None:
    await rig.rows(machine_row("web", "m0", "127.0.9.101"))  # nothing listens there
    for _ in range(6):
        async with line(DEDICATED, rig.doors.raw) as client:
            await client.say(b"a")
            assert await client.hear(1) == b"A"
    await rig.app.stop()
    async with line(DEDICATED, rig.doors.raw) as client:
        assert await client.rest() == b""
    assert "listen on 0.0.0.0" in await rig.logged("PC01")


async def test_connections_beyond_the_bound_are_dropped_and_counted(tmp_path: Path) -> None:
    async with entry_rig(tmp_path, connections_per_app_max=2) as rig:
        async with line(DEDICATED, rig.doors.raw) as one, line(DEDICATED, rig.doors.raw) as two:
            for client in (one, two):
                await client.say(b"a")
                assert await client.hear(1) == b"A"
            for _ in range(10):
                async with line(DEDICATED, rig.doors.raw) as third:
                    assert await third.rest() == b""
            assert "10 connections were dropped" in await rig.logged("", times=2)

        async def gets_in() -> bytes:
            async with line(DEDICATED, rig.doors.raw) as client:
                client.writer.write_eof()
                return await client.rest()

        assert await until(gets_in, bool, within_s=10, every_s=0.02) == b"BYE"


async def test_flycast_is_closed_to_who_is_in_no_network(rig: EntryRig) -> None:
    await rig.rows(row("routes", f"addr/{DEDICATED}", {"kind": "private", "app": "web"}))
    async with line(DEDICATED, rig.doors.raw) as client:
        assert await client.rest() == b""
    assert rig.app.heard == []
