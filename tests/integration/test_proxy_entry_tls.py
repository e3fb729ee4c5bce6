"""Certificates, session tickets and the limits of handshakes, at the door of the proxy."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest
from entry_rig import DEDICATED, NAME, SHARED, EntryRig, entry_rig, line
from proxy_rig import WITHIN_S, row, running

from pantala.kit.sealing import b64
from pantala.wire.feed import ServiceRow, TicketRow
from pantala.wire.machine import Concurrency, Port, TLSOptions

pytestmark = pytest.mark.anyio

SUITES_12 = {"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[EntryRig]:
    async with entry_rig(tmp_path) as rig:
        yield rig


async def refused(ip: str, port: int, context: ssl.SSLContext, name: str | None) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        async with line(ip, port, ssl=context, server_hostname=name):
            pass


async def test_a_missing_certificate_is_named_in_the_apps_log(rig: EntryRig) -> None:
    await refused(DEDICATED, rig.doors.mqtt, rig.ca.context("mqtt"), "other.test")
    line_of_log = await rig.logged("PT05")
    assert "other.test" in line_of_log
    assert "certs add" in line_of_log
    nameless = rig.ca.context("mqtt")
    nameless.check_hostname = False
    await refused(DEDICATED, rig.doors.mqtt, nameless, None)
    assert "named no host" in await rig.logged("PT06")
    distrustful = ssl.create_default_context()
    distrustful.set_alpn_protocols(["mqtt"])
    await anyio.to_thread.run_sync(distrusts, distrustful, rig.doors.mqtt)
    assert "UnknownCA" in await rig.logged("PT04")


def distrusts(context: ssl.SSLContext, port: int) -> None:
    """Says so to the other side, which asyncio does not."""
    with (
        pytest.raises(ssl.SSLCertVerificationError),
        socket.create_connection((DEDICATED, port), WITHIN_S) as plain,
        context.wrap_socket(plain, server_hostname=NAME),
    ):
        pass


async def test_who_leaves_during_the_handshake_is_told_as_such(rig: EntryRig) -> None:
    async with line(DEDICATED, rig.doors.mqtt) as client:
        await client.say(b"\x16\x03\x01\x02")
        client.writer.write_eof()
        assert await client.rest() == b""
    assert "left" in await rig.logged("PT03")


@pytest.mark.parametrize("suites", [*sorted(SUITES_12), "ECDHE-ECDSA-AES128-SHA", "ECDHE-RSA-AES128-GCM-SHA256"])
async def test_the_suites_of_tls_1_2(rig: EntryRig, suites: str) -> None:
    context = rig.ca.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suites)
    if suites not in SUITES_12:
        return await refused(SHARED, rig.rig.ports.https, context, NAME)
    async with line(SHARED, rig.rig.ports.https, ssl=context, server_hostname=NAME) as client:
        assert client.tls.cipher()[0] == suites  # type: ignore[index]
    return None


@pytest.mark.parametrize("suites", [suite.replace("ECDSA", "RSA") for suite in sorted(SUITES_12)])
async def test_a_user_s_rsa_certificate_with_tls_1_2(rig: EntryRig, suites: str) -> None:
    await rig.rows(row("certs", "cert/web", rig.ca.issue(NAME, by_rsa=True)))
    context = rig.ca.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suites)
    async with line(SHARED, rig.rig.ports.https, ssl=context, server_hostname=NAME) as client:
        assert client.tls.cipher()[0] == suites  # type: ignore[index]
    context.set_ciphers("ECDHE-RSA-AES128-SHA:AES128-GCM-SHA256")  # no AEAD, no ephemeral key
    await refused(SHARED, rig.rig.ports.https, context, NAME)


async def test_self_signed_only_where_the_port_says_so(rig: EntryRig) -> None:
    options = TLSOptions(default_self_signed=True)
    service = ServiceRow(
        app="web",
        protocol="tcp",
        internal_port=rig.app.port,
        ports=[Port(port=rig.doors.https, handlers=["tls"], tls_options=options)],
        concurrency=Concurrency(),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    await refused(DEDICATED, rig.doors.https, context, "unknown.test")
    await rig.rows(row("routes", "svc/web/d1", service))
    async with line(DEDICATED, rig.doors.https, ssl=context, server_hostname="unknown.test") as client:
        await client.say(b"a")
        assert await client.hear(1) == b"A"
    async with line(DEDICATED, rig.doors.https, ssl=rig.ca.context(), server_hostname=NAME) as client:
        await client.say(b"a")
        assert await client.hear(1) == b"A"


async def test_a_challenge_is_shown_to_who_asks_for_nothing_else(rig: EntryRig) -> None:
    name = "new.test"
    proof = msgspec.structs.replace(rig.ca.issue(name), alpn="acme-tls/1")
    await rig.rows(row("certs", "cert/challenge", proof))
    port = rig.rig.ports.https
    async with line(SHARED, port, ssl=rig.ca.context("acme-tls/1"), server_hostname=name) as client:
        assert client.tls.selected_alpn_protocol() == "acme-tls/1"
        assert await client.rest() == b""  # closed after the handshake
    await refused(SHARED, port, rig.ca.context("acme-tls/1"), NAME)
    await refused(SHARED, port, rig.ca.context("h2", "acme-tls/1"), name)
    await refused(SHARED, port, rig.ca.context(), name)


def resumed(ip: str, port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, Any]:
    """Whether the session went on, and the one to go on with."""
    with (
        socket.create_connection((ip, port), WITHIN_S) as plain,
        context.wrap_socket(plain, server_hostname=NAME, session=session) as tls,
    ):
        tls.sendall(f"GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode())
        while tls.recv(4096):
            pass
        return bool(tls.session_reused), tls.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "own keys"])
async def test_a_session_goes_on_at_another_edge(tmp_path: Path, version: ssl.TLSVersion, *, shared: bool) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with running(tmp_path / "a") as here, running(tmp_path / "b") as there:
        now_ms = int(time.time() * 1000)
        key = TicketRow(not_before_ms=now_ms - 60_000, not_after_ms=now_ms + 3_600_000, key=b64(os.urandom(32)))
        cert = row("certs", "cert/web", here.ca.issue(NAME))
        for rig in (here, there):
            await rig.agent.rows(cert, *([row("certs", "ticket/1", key)] if shared else []))
        context = here.ca.context()
        context.maximum_version = version

        def ask(rig: Any, session: Any) -> tuple[bool, Any]:
            return resumed("127.0.0.1", rig.ports.https, context, session)

        _, session = await anyio.to_thread.run_sync(ask, here, None)
        assert (await anyio.to_thread.run_sync(ask, here, session))[0]
        assert (await anyio.to_thread.run_sync(ask, there, session))[0] is shared


async def test_a_ticket_key_that_is_none_is_set_aside(rig: EntryRig) -> None:
    await rig.rows(row("certs", "ticket/bad", TicketRow(not_before_ms=0, not_after_ms=1, key="AAAA")))
    assert await rig.rig.agent.applied() == ["ticket/bad"]


async def test_handshakes_of_a_range_and_of_a_name_are_bounded(tmp_path: Path) -> None:
    async def count(rig: EntryRig) -> int:
        through = 0
        for _ in range(8):
            try:
                async with line(DEDICATED, rig.doors.https, ssl=rig.ca.context(), server_hostname=NAME):
                    through += 1
            except (ssl.SSLError, ConnectionError):
                pass
        return through

    for name, code in (("range", "PT01"), ("name", "PT02")):
        folder = tmp_path / name
        folder.mkdir()
        async with entry_rig(folder, **{f"handshakes_per_{name}_per_s_max": 1}) as rig:
            # Two at once, and one more for each second that the others take.
            began = time.monotonic()
            through = await count(rig)
            assert 2 <= through <= 3 + (time.monotonic() - began)
            assert "1 a second" in await rig.logged(code)


async def test_thousands_of_certificates_cost_nothing_until_they_are_asked_for(rig: EntryRig) -> None:
    many = 3_000
    issued = rig.ca.issue("*.many.test")
    rows = [row("certs", f"cert/{n}", msgspec.structs.replace(issued, names=[f"n{n}.many.test"])) for n in range(many)]
    await rig.rows(*rows)
    assert (await rig.rig.snapshot())["certificate_names"] == many + 1
    for n in (0, many - 1):
        async with line(SHARED, rig.rig.ports.https, ssl=rig.ca.context(), server_hostname=f"n{n}.many.test"):
            pass
    newer = rig.ca.issue("n7.many.test")
    await rig.rows(row("certs", "cert/7", newer))
    context = rig.ca.context()
    async with line(SHARED, rig.rig.ports.https, ssl=context, server_hostname="n7.many.test") as client:
        names = client.tls.getpeercert()["subjectAltName"]  # type: ignore[index]
    assert names == (("DNS", "n7.many.test"),)
