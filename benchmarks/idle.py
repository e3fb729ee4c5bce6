"""What idle connections weigh: thousands of kept TLS connections to each proxy, of HTTP/1.1 and then of HTTP/2, held
by one client process, some seconds after the last of them was answered. Both are weighed against what the proxy had
before either."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence

from h2.connection import H2Connection

from benchmarks import load
from benchmarks.figures import Figure, figure
from benchmarks.peers import HTTPS, NAME, Peer
from pantala.testing.authority import Authority

CONNECTIONS = 10_000
FEWER = {"haproxy": 9_800}
"""It counts two descriptors for each, and a process may have 20,000 here."""
AT_ONCE = 200
BODY_BYTES = 1024
QUIET_S = 5.0
"""Before they are weighed: idle is what nothing came on for a while."""
OURS = "pantala"


SETTINGS_AGREED = bytes.fromhex("000000040100000000")
PROTOCOLS = {"http/1.1": "proxy.memory_kib_connection", "h2": "proxy.memory_kib_connection_http2"}


def measure(all_peers: Sequence[Peer], authority: Authority) -> list[Figure]:
    figures: list[Figure] = []
    before = {peer.name: load.memory_kib(peer.pid) for peer in all_peers}
    for protocol, name in PROTOCOLS.items():
        weights = {
            peer.name: asyncio.run(_kib_each(peer, before[peer.name], authority, protocol))
            for peer in all_peers
            if peer.name != "traefik"
        }
        told = ", ".join(f"{name} {kib:.1f}" for name, kib in weights.items())
        meaning = (
            f"resident memory for each of 10,000 idle TLS connections of {protocol}, one request made on each, "
            f"5 s ago; all: {told}"
        )
        figures.append(figure(name, weights[OURS], "KiB", n=CONNECTIONS, baseline=weights["haproxy"], meaning=meaning))
    return figures


def accepts(peer: Peer) -> bool:
    try:
        socket.create_connection((peer.address, HTTPS), timeout=1).close()
    except OSError:
        return False
    return True


async def _kib_each(peer: Peer, before: int, authority: Authority, protocol: str) -> float:
    context = authority.context(protocol)
    gate = asyncio.Semaphore(AT_ONCE)
    number = FEWER.get(peer.name, CONNECTIONS)
    first = _first_words(protocol)
    held = await asyncio.gather(*(_open(peer, context, gate, first) for _ in range(number)))
    await asyncio.sleep(QUIET_S)
    weight = (load.memory_kib(peer.pid) - before) / number
    for transport in held:
        transport.abort()
    await asyncio.sleep(0)
    return weight


def _first_words(protocol: str) -> bytes:
    if protocol != "h2":
        return f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
    client = H2Connection()
    client.initiate_connection()
    client.increment_flow_control_window(1 << 24)
    target = [(":method", "GET"), (":scheme", "https"), (":authority", NAME), (":path", "/")]
    client.send_headers(1, [*target, ("user-agent", "pantala-bench"), ("accept", "*/*")], end_stream=True)
    return client.data_to_send()


class _Client(asyncio.Protocol):
    """Asks once and keeps the connection; lighter than a pair of streams."""

    def __init__(self, first: bytes) -> None:
        self.answered = asyncio.get_running_loop().create_future()
        self._first, self._came = first, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._first)
        if not self._first.startswith(b"GET"):
            transport.write(SETTINGS_AGREED)

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        if self._came > BODY_BYTES and not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(exc or ConnectionError("closed before an answer"))


async def _open(peer: Peer, context: ssl.SSLContext, gate: asyncio.Semaphore, first: bytes) -> asyncio.Transport:
    async with gate:
        loop = asyncio.get_running_loop()
        transport, client = await loop.create_connection(
            lambda: _Client(first), peer.address, HTTPS, ssl=context, server_hostname=NAME
        )
        await client.answered
        return transport
