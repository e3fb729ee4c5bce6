"""Clients that are silent: asked for a sign of life, and given up when they give none; those that never said a word, or
none of HTTP/2 though they agreed on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest
from app_rig import app
from h2.connection import H2Connection
from h2.events import PingReceived
from http2_rig import HEAD_BYTES, Speaker, connected
from mesh_rig import HOST
from proxy_rig import WITHIN_S, Rig, answer, row, running
from test_proxy_parked import gauge, parked

from pantala.testing.poll import until
from pantala.wire.machine import HTTPOptions

pytestmark = pytest.mark.anyio
PING, GOAWAY = 6, 7
HELLO_MAX_S = 10.0
"""From the accept to the end of a ClientHello."""
SETTINGS_AGREED = bytes.fromhex("000000 04 01 00000000")


async def quick(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(answer(b"ok"))


@contextlib.asynccontextmanager
async def proxy(folder: Path, options: HTTPOptions | None = None, **settings: int) -> AsyncGenerator[Rig]:
    async with running(folder, **settings) as rig:
        await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
        async with app(rig, quick, options):
            yield rig


@contextlib.asynccontextmanager
async def agreed(rig: Rig) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that has agreed on HTTP/2, and speaks it as the test says."""
    reader, writer = await asyncio.open_connection(
        rig.address, rig.ports.https, ssl=rig.ca.context("h2"), server_hostname=HOST
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[int]:
    """The kinds of all frames, until the proxy closes."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readexactly(HEAD_BYTES)
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            yield head[3]


def first_words() -> bytes:
    client = H2Connection()
    client.initiate_connection()
    client.send_headers(
        1, [(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/")], end_stream=True
    )
    return client.data_to_send() + SETTINGS_AGREED


async def serves(one: Speaker) -> None:
    assert (await one.answer(one.ask()))[1] == b"ok"


# -- signs of life -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ping_after_ms", [300, 2_500], ids=["not yet parked", "parked"])
async def test_a_client_that_gives_no_sign_of_life_is_given_up(tmp_path: Path, ping_after_ms: int) -> None:
    # Long enough for one who answers on a busy machine.
    short = proxy(tmp_path, client_ping_after_ms=ping_after_ms, client_ping_timeout_ms=3_000)
    async with short as rig, connected(rig) as alive, agreed(rig) as (reader, writer):
        await serves(alive)
        writer.write(first_words())
        if ping_after_ms > 2_000:
            await parked(rig, 2)
        async with asyncio.timeout(WITHIN_S):
            kinds = [kind async for kind in frames(reader)]
        assert PING in kinds
        assert GOAWAY not in kinds, "nobody is there to be told"

        async def asked() -> int:
            return sum(isinstance(event, PingReceived) for event in await alive.heard())

        await until(asked, lambda number: number >= 2, within_s=WITHIN_S)
        await serves(alive)
        assert await gauge(rig, "connections_open") == 1


async def test_usually_nobody_is_asked_so_soon(tmp_path: Path) -> None:
    async with proxy(tmp_path) as rig, connected(rig) as one:
        assert (rig.settings.client_ping_after_ms, rig.settings.client_ping_timeout_ms) == (40_000, 20_000)
        await serves(one)
        await parked(rig, 1)
        assert not any(isinstance(event, PingReceived) for event in await one.heard())


# -- those who never speak ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: web.apps.test\r\n\r\n", id="another protocol"),
        pytest.param(bytes(100), id="zeroes instead of the preface"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100, id="noise after the preface"),
        pytest.param(first_words() + bytes.fromhex("000001 01 05 00000003 ff"), id="fields that nobody can read"),
        pytest.param(first_words() + bytes.fromhex("000004 08 00 00000000 00000000"), id="a window of nothing"),
    ],
)
async def test_noise_ends_its_connection_and_no_other(tmp_path: Path, said: bytes) -> None:
    async with proxy(tmp_path) as rig, connected(rig) as other, agreed(rig) as (reader, writer):
        waiting = other.ask()
        writer.write(said)
        async with asyncio.timeout(WITHIN_S):
            _ = [kind async for kind in frames(reader)]
        assert (await other.answer(waiting))[1] == b"ok"
        await serves(other)
        await until(lambda: gauge(rig, "connections_open"), lambda number: number == 1, within_s=WITHIN_S)
        assert await gauge(rig, "http2_broken_total") == 1


async def test_noise_after_a_quiet_time_ends_its_connection_and_no_other(tmp_path: Path) -> None:
    async with proxy(tmp_path) as rig, connected(rig) as other, agreed(rig) as (reader, writer):
        writer.write(first_words())
        await serves(other)
        await parked(rig, 2)
        writer.write(bytes.fromhex("000001 01 05 00000003 ff"))
        async with asyncio.timeout(WITHIN_S):
            kinds = [kind async for kind in frames(reader)]
        assert kinds[-1] == GOAWAY
        await serves(other)
        assert await gauge(rig, "http2_broken_total") == 1


async def test_clients_that_never_say_a_word_are_closed(tmp_path: Path) -> None:
    """Without TLS and without HTTP/2, each at the end of its own time; they are all there at once."""
    async with proxy(tmp_path, HTTPOptions(idle_timeout=1)) as rig, contextlib.AsyncExitStack() as stack:
        await rig.agent.rows(row("routes", f"addr/{rig.address}", {"kind": "dedicated", "app": "web"}))
        began = asyncio.get_running_loop().time()
        plain = [await asyncio.open_connection(rig.address, rig.ports.http) for _ in range(3)]
        unsecured = [await asyncio.open_connection(rig.address, rig.ports.https) for _ in range(3)]
        wordless = [await stack.enter_async_context(agreed(rig)) for _ in range(3)]
        for reader, _ in plain:
            assert await asyncio.wait_for(reader.read(), WITHIN_S) == b""
        async with connected(rig) as one:
            await serves(one)
        for reader, _ in wordless:
            async with asyncio.timeout(WITHIN_S):
                _ = [kind async for kind in frames(reader)]
        assert await gauge(rig, "http2_broken_total") == len(wordless)
        for reader, _ in unsecured:
            assert await asyncio.wait_for(reader.read(), WITHIN_S) == b""
        assert asyncio.get_running_loop().time() - began >= HELLO_MAX_S
        assert await gauge(rig, "handshakes_failed_total") == len(unsecured)
        await until(lambda: gauge(rig, "connections_open"), lambda number: number == 0, within_s=WITHIN_S)
        for _, writer in plain + unsecured:
            writer.close()
