"""What the hop between two hosts costs: the same small request served by a machine of the edge's own host and by one
of another host, through two real proxies on loopback addresses, in turns of the same run.

No agent and no box: each proxy starts from a saved view. CPU is that of the proxies alone as the kernel counts it to
the nanosecond, the median of many short rounds; latency that of one client that asks again as soon as it is answered;
the network between real hosts comes on top of it.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import Figure, figure, percentile
from benchmarks.load import cpu_s
from pantala.kit import binaries
from pantala.testing.authority import Authority
from pantala.wire.feed import (
    AppRow,
    DNSSettings,
    FeedRow,
    HostRow,
    Listener,
    MachineRow,
    MemberRow,
    MeshSettings,
    NodeRow,
    ProxySettings,
    ServiceRow,
)
from pantala.wire.machine import Concurrency, Port

ROUNDS = 40
"""What else the machine does hits one or the other of them, and not the median."""
REQUESTS = 1_000
"""Of each path in each round, for CPU."""
ALONE = 50
"""Of one client in each round, for latency."""
CLIENTS = 16
PORT, MESH_PORT, APP_PORT = 28480, 28481, 28482
HOSTS = {"n1": "127.0.4.1", "n2": "127.0.4.2"}
REGIONS = {"n1": "iad", "n2": "lhr"}
MACHINES = {"n1": "127.0.5.1", "n2": "127.0.5.2"}
PATHS = {"direct": "near.bench.test", "mesh": "far.bench.test"}
HOME = {"direct": "n1", "mesh": "n2"}
READY_WITHIN_S = 10.0


def measure() -> list[Figure]:
    authority = Authority()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pantala-bench-")))
        pids = [stack.enter_context(_proxy(work / node, node, authority)) for node in HOSTS]
        return asyncio.run(_measured(pids))


async def _measured(pids: Sequence[int]) -> list[Figure]:
    servers = [await _app(address) for address in MACHINES.values()]
    try:
        cpu_us: dict[str, list[float]] = {path: [] for path in PATHS}
        latency_s: dict[str, list[float]] = {path: [] for path in PATHS}
        for path in PATHS:
            await _ready(path)
        for number in range(ROUNDS):
            for path in sorted(PATHS, reverse=number % 2 > 0):
                latency_s[path] += await _ask(path, ALONE)
                before = sum(map(cpu_s, pids))
                await asyncio.gather(*(_ask(path, REQUESTS // CLIENTS) for _ in range(CLIENTS)))
                spent_s = sum(map(cpu_s, pids)) - before
                cpu_us[path].append(spent_s * 1e6 / (REQUESTS // CLIENTS * CLIENTS))
    finally:
        for server in servers:
            server.close()
    return _figures(cpu_us, latency_s)


def _figures(cpu_us: dict[str, list[float]], latency_s: dict[str, list[float]]) -> list[Figure]:
    n = ROUNDS * (REQUESTS // CLIENTS) * CLIENTS
    medians = {path: statistics.median(samples) for path, samples in cpu_us.items()}
    spread = {path: f"{min(samples):.1f}–{max(samples):.1f}" for path, samples in cpu_us.items()}
    figures = [
        figure("mesh.cpu", medians["mesh"], "µs", n=n, baseline=medians["direct"],
               meaning="CPU of both proxies for a request over the mesh, beside one served on its own host; "
                       f"{spread['mesh']} against {spread['direct']}"),
    ]  # fmt: skip
    for percent in (50, 99):
        far, near = (percentile(latency_s[path], percent) * 1e6 for path in ("mesh", "direct"))
        figures.append(
            figure(f"mesh.latency.p{percent}", far, "µs", n=len(latency_s["mesh"]), baseline=near,
                   meaning="answer over the mesh on loopback, beside one served on its own host"),
        )  # fmt: skip
    return figures


# -- clients and apps --------------------------------------------------------------------------------------------


async def _ask(path: str, number: int) -> list[float]:
    """One after the other on one connection."""
    took: list[float] = []
    request = f"GET / HTTP/1.1\r\nHost: {PATHS[path]}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection(HOSTS["n1"], PORT)
    try:
        for _ in range(number):
            begun = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise AssertionError(f"{path}: {head.splitlines()[0]!r}")
            await reader.readexactly(2)
            took.append(time.perf_counter() - begun)
    finally:
        writer.close()
    return took


async def _ready(path: str) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while not await _answers(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer over the {path} path within {READY_WITHIN_S:g} s")
        await asyncio.sleep(0.05)


async def _answers(path: str) -> bool:
    try:
        await _ask(path, 20)
    except (AssertionError, OSError, asyncio.IncompleteReadError):
        return False
    return True


class _Answer(asyncio.Protocol):
    """The app: a word to every request, whatever it asks."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" * data.count(b"\r\n\r\n"))


async def _app(address: str) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(_Answer, address, APP_PORT)


# -- proxies -----------------------------------------------------------------------------------------------------


@contextmanager
def _proxy(folder: Path, node: str, authority: Authority) -> Generator[int]:
    folder.mkdir()
    issued = authority.issue(f"{node}.node.pantala.internal")
    files = {"authority": authority.pem(), "certificate": issued.chain_pem, "key": issued.key_pem}
    for name, text in files.items():
        (folder / name).write_text(text)
    mesh = MeshSettings(
        listen=f"{HOSTS[node]}:{MESH_PORT}",
        certificate=str(folder / "certificate"),
        key=str(folder / "key"),
        authority=str(folder / "authority"),
    )
    settings = ProxySettings(
        node=node,
        region=REGIONS[node],
        state_dir=str(folder),
        agent_socket=str(folder / "nobody.sock"),
        listeners=[Listener(address=HOSTS[node], port=PORT, tls=False)],
        dns=DNSSettings(listen=[], public_listen=[], public_names={}, forward=[]),
        mesh=mesh,
    )
    (folder / "settings.json").write_bytes(msgspec.json.encode(settings))
    (folder / "snapshot-0.json").write_bytes(msgspec.json.encode({"revision": 1, "rows": _rows()}))
    program = str(binaries.find("pantala-proxy"))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "--settings", str(folder / "settings.json")], stdout=log, stderr=log)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _rows() -> list[FeedRow]:
    rows: list[FeedRow] = []

    def add(stream: str, key: str, value: msgspec.Struct) -> None:
        rows.append(FeedRow(stream=stream, key=key, value=msgspec.to_builtins(value)))

    for node, address in HOSTS.items():
        known: dict[str, Any] = {"id": node, "region": REGIONS[node], "zone": "a", "address": address}
        known |= {"verify_key": "", "sealing_key": ""}
        add("nodes", f"member/{node}", MemberRow(**known, edge=True))
        free: dict[str, Any] = {"cpus": 1, "memory_mib": 1, "cpus_free": 1.0, "memory_mib_free": 1, "version": "0"}
        add("nodes", f"node/{node}", NodeRow(**known, **free, mesh=f"{address}:{MESH_PORT}"))
    for path, name in PATHS.items():
        app, node = name.split(".")[0], HOME[path]
        add("routes", f"app/{app}", AppRow(app=app, org="bench", network=1))
        add("routes", f"host/{name}", HostRow(app=app))
        service = ServiceRow(
            app=app,
            protocol="tcp",
            internal_port=APP_PORT,
            ports=[Port(port=PORT, handlers=["http"])],
            concurrency=Concurrency(type="requests", soft_limit=1000, hard_limit=1000),
        )
        add("routes", f"svc/{app}/d", service)
        machine = MachineRow(
            id=f"m-{app}",
            app=app,
            region=REGIONS[node],
            node=node,
            instance_id="01A",
            generation=1,
            state="started",
            ip4=MACHINES[node],
            ip6="",
            services=["d"],
            passing=[True],
        )
        add("routes", f"m/m-{app}", machine)
    return rows
