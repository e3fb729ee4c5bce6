"""A hundred thousand routes in our proxy: what they weigh, what a request costs among them beside one route alone, and
how soon a change is in force while requests go on.

A stand-in for the agent sends the view over the feed; all machines but one are on another host. The change moves one
of them; it counts as in force once the proxy has said so, and the longest answers of a client that asks without a pause
meanwhile show whether it stalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from benchmarks import load, peers
from benchmarks.figures import Figure, figure, percentile
from benchmarks.load import Case
from pantala.kit import binaries
from pantala.wire.feed import AgentHello, Delta, DNSSettings, FeedRow, Listener, ProxySettings, Snapshot

ROUTES = int(os.environ.get("BENCH_ROUTES", "100000"))
RUNS = 7
CHANGES = 100
ROWS_A_FRAME = 4_000
WITHIN_S = 120.0
ADDRESS = "127.0.4.20"
CASE = Case(name="routes", meaning="HTTP/1.1 keep-alive, 1 KiB", requests=20_000, clients=32)


def measure() -> list[Figure]:
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pantala-bench-")))
        work.chmod(0o755)
        stack.enter_context(peers.app(work))
        return asyncio.run(_measured(work))


async def _measured(work: Path) -> list[Figure]:
    alone = peers.routes("bench", peers.NAME)
    many = [row for n in range(ROUTES) for row in peers.routes(f"app-{n}", f"app-{n}.test", node="n2")]
    async with (
        _proxy(work / "one", ADDRESS) as (one, agent_of_one),
        _proxy(work / "many", "127.0.4.21") as (all_, agent),
    ):
        await agent_of_one.snapshot(alone)
        begun = time.perf_counter()
        await agent.snapshot([*alone, *many])
        learnt_s = time.perf_counter() - begun
        cpu: dict[str, list[float]] = {"one": [], "many": []}
        for _ in range(RUNS):
            for name, peer in (("one", one), ("many", all_)):
                cpu[name].append((await asyncio.to_thread(load.run, CASE, peer, work)).cpu_us)
        weight = {name: load.memory_kib(peer.pid) / 1024 for name, peer in (("one", one), ("many", all_))}
        quiet = await _longest_answers(all_, None)
        changes_ms, busy = await _changes(agent, all_)
    return [
        figure("cpu_us_routes", statistics.median(cpu["many"]), "µs", n=RUNS * CASE.requests,
               baseline=statistics.median(cpu["one"]), meaning=f"a request among {ROUTES:,} routes, beside one route"),
        figure("proxy.routes_memory_mib", weight["many"], "MiB", n=1, baseline=weight["one"],
               meaning=f"resident with {ROUTES:,} routes, beside one"),
        figure("proxy.routes_learnt_s", learnt_s, "s", n=1, meaning=f"{ROUTES:,} routes in force after a start"),
        figure("proxy.route_change_ms_p50", percentile(changes_ms, 50), "ms", n=CHANGES, meaning="a change in force"),
        figure("proxy.route_change_ms_p99", percentile(changes_ms, 99), "ms", n=CHANGES, meaning="the same"),
        figure("proxy.route_change_pause_ms", percentile(busy, 99.9), "ms", n=len(busy),
               baseline=percentile(quiet, 99.9), meaning="p99.9 of answers while routes change, beside none changing"),
    ]  # fmt: skip


async def _changes(agent: _Agent, peer: peers.Peer) -> tuple[list[float], list[float]]:
    took_ms: list[float] = []

    async def change() -> None:
        for n in range(CHANGES):
            rows = peers.routes(f"app-{n}", f"app-{n}.test", address=f"127.0.5.{2 + n % 2}", node="n2")
            begun = time.perf_counter()
            await agent.delta(rows)
            took_ms.append((time.perf_counter() - begun) * 1e3)
            await asyncio.sleep(0.02)

    answers = await _longest_answers(peer, change())
    return took_ms, answers


async def _longest_answers(peer: peers.Peer, meanwhile: Coroutine[None, None, None] | None) -> list[float]:
    """Milliseconds of each answer to a client that asks without a pause, for as long as the other work takes or 2 s."""
    work = asyncio.ensure_future(meanwhile if meanwhile is not None else asyncio.sleep(2))
    reader, writer = await asyncio.open_connection(peer.address, peers.HTTP)
    took: list[float] = []
    while not work.done():
        begun = time.perf_counter()
        writer.write(f"GET / HTTP/1.1\r\nHost: {peers.NAME}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(1024)
        took.append((time.perf_counter() - begun) * 1e3)
    writer.close()
    await work
    return took


# -- the agent's end ---------------------------------------------------------------------------------------------


class _Agent:
    """The one proxy that has connected, and the revisions that it has put in force."""

    def __init__(self) -> None:
        self._connected: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        self._applied = asyncio.Condition()
        self._revision = self._seen = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connected.set_result(writer)
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            while line := await reader.readline():
                said = msgspec.json.decode(line)
                if said["type"] == "applied":
                    async with self._applied:
                        self._seen = said["revision"]
                        self._applied.notify_all()

    async def snapshot(self, rows: list[FeedRow]) -> None:
        self._revision += 1
        await self._send(AgentHello(protocol=1, node="n1", region="iad"))
        for at in range(0, len(rows), ROWS_A_FRAME):
            part = rows[at : at + ROWS_A_FRAME]
            await self._send(Snapshot(revision=self._revision, rows=part, last=at + ROWS_A_FRAME >= len(rows)))
        await self._in_force()

    async def delta(self, rows: list[FeedRow]) -> None:
        self._revision += 1
        await self._send(Delta(revision=self._revision, rows=rows))
        await self._in_force()

    async def _send(self, frame: msgspec.Struct) -> None:
        writer = await asyncio.wait_for(asyncio.shield(self._connected), WITHIN_S)
        writer.write(msgspec.json.encode(frame) + b"\n")
        await writer.drain()

    async def _in_force(self) -> None:
        async with self._applied:
            await asyncio.wait_for(self._applied.wait_for(lambda: self._seen >= self._revision), WITHIN_S)


@asynccontextmanager
async def _proxy(folder: Path, address: str) -> AsyncGenerator[tuple[peers.Peer, _Agent]]:
    folder.mkdir()
    agent = _Agent()
    server = await asyncio.start_unix_server(agent.serve, folder / "agent.sock", limit=1 << 24)
    settings = ProxySettings(
        node="n1",
        region="iad",
        state_dir=str(folder),
        agent_socket=str(folder / "agent.sock"),
        listeners=[Listener(address=address, port=peers.HTTP, tls=False)],
        dns=DNSSettings(listen=[], public_listen=[], public_names={}, forward=[]),
    )
    (folder / "settings.json").write_bytes(msgspec.json.encode(settings))
    command = [str(binaries.find("pantala-proxy")), "--settings", str(folder / "settings.json")]
    with peers.started(command, core=peers.PROXY_CORE, log=folder / "log") as pid:
        yield peers.Peer(name="pantala", address=address, pid=pid), agent
    server.close()
