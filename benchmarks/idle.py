"""What idle connections weigh: thousands of kept TLS connections to each proxy, held open by one client process, some
seconds after the last of them was answered."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence

from benchmarks import load
from benchmarks.figures import Figure, figure
from benchmarks.peers import HTTPS, NAME, Peer
from pantala.testing.authority import Authority

CONNECTIONS = 10_000
FEWER = {"haproxy": 9_800}
"""It counts two descriptors for each, and a process may have 20,000 here."""
AT_ONCE = 200
QUIET_S = 5.0
"""Before they are weighed: idle is what nothing came on for a while."""
OURS = "pantala"


def measure(all_peers: Sequence[Peer], authority: Authority) -> list[Figure]:
    weights = {peer.name: asyncio.run(_kib_each(peer, authority)) for peer in all_peers if peer.name != "traefik"}
    meaning = (
        "resident memory for each of 10,000 idle TLS connections, one request made on each, 5 s ago; all: "
        + ", ".join(f"{name} {kib:.1f}" for name, kib in weights.items())
    )
    return [
        figure("proxy.memory_kib_connection", weights[OURS], "KiB", n=CONNECTIONS, baseline=weights["haproxy"],
               meaning=meaning)
    ]  # fmt: skip


def accepts(peer: Peer) -> bool:
    try:
        socket.create_connection((peer.address, HTTPS), timeout=1).close()
    except OSError:
        return False
    return True


async def _kib_each(peer: Peer, authority: Authority) -> float:
    before = load.memory_kib(peer.pid)
    context = authority.context("http/1.1")
    gate = asyncio.Semaphore(AT_ONCE)
    number = FEWER.get(peer.name, CONNECTIONS)
    held = await asyncio.gather(*(_open(peer, context, gate) for _ in range(number)))
    await asyncio.sleep(QUIET_S)
    weight = (load.memory_kib(peer.pid) - before) / number
    for transport in held:
        transport.abort()
    await asyncio.sleep(0)
    return weight


class _Client(asyncio.Protocol):
    """Asks once and keeps the connection; lighter than a pair of streams."""

    def __init__(self) -> None:
        self.answered = asyncio.get_running_loop().create_future()
        self._said = b""

    def data_received(self, data: bytes) -> None:
        self._said = (self._said + data)[:64]
        if not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(exc or ConnectionError("closed before an answer"))


async def _open(peer: Peer, context: ssl.SSLContext, gate: asyncio.Semaphore) -> asyncio.Transport:
    async with gate:
        loop = asyncio.get_running_loop()
        transport, client = await loop.create_connection(
            _Client, peer.address, HTTPS, ssl=context, server_hostname=NAME
        )
        transport.write(f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
        await client.answered
        return transport
