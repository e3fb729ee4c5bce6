"""What our proxy costs beside HAProxy, nginx, Caddy and Traefik: each on one core, asked in turns within the same run.

The client (h2load) and the app (nginx) share the other core. CPU is that of the proxy alone, as the kernel counts its
threads; a figure is the median of `RUNS` turns, with the least and the most in its description. The baseline of a
CPU figure is HAProxy, of handshakes and added latency nginx.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks import idle, load, peers
from benchmarks.figures import Figure, figure, percentile
from benchmarks.load import Case
from benchmarks.peers import Peer
from pantala.testing.authority import Authority
from pantala.testing.poll import until_sync

RUNS = int(os.environ.get("BENCH_RUNS", "7"))
READY_WITHIN_S = 20.0
OURS = "pantala"

CASES = [
    Case(name="http1", meaning="HTTP/1.1 keep-alive, 1 KiB", requests=20_000, clients=32),
    Case(name="https1", meaning="HTTPS keep-alive, 1 KiB", requests=20_000, clients=32, tls=True),
    Case(name="http2", meaning="HTTP/2 over TLS, 8 streams a connection, 1 KiB", requests=20_000, clients=8, tls=True,
         http2=True, streams=8),
    Case(name="handshake", meaning="new TLS connection with one request", requests=1_000, clients=1_000, tls=True),
    Case(name="down_1mib", meaning="1 MiB to the client", requests=600, clients=8, path="/large"),
    Case(name="up_1mib", meaning="1 MiB to the app", requests=600, clients=8, path="/take", upload=True),
]  # fmt: skip
LATENCY = Case(name="latency", meaning="", requests=600, clients=20, rate=2_000)
# Many short turns: what else the machine does hits one or the other of them, and not the median.
LATENCY_RUNS = 31
BASELINES = {"handshake": "nginx"}


def measure() -> list[Figure]:
    if absent := peers.missing():
        raise SystemExit(f"not installed: {', '.join(absent)} (scripts/install --bench)")
    figures: list[Figure] = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pantala-bench-")))
        work.chmod(0o755)
        stack.enter_context(peers.app(work))
        authority = Authority()
        all_peers = [
            stack.enter_context(peers.running(name, index, work, authority))
            for index, name in enumerate(peers.SETUPS, start=11)
        ]
        figures += [_memory(peer) for peer in all_peers if peer.name == OURS]
        for peer in all_peers:
            _ready(peer, work)
        for case in CASES:
            figures += _cost(case, all_peers, work)
        figures += _added(all_peers, work)
        figures += idle.measure(all_peers, authority)
    return figures


def _ready(peer: Peer, work: Path) -> None:
    """Each way to ask it answers."""
    deadline = time.monotonic() + READY_WITHIN_S
    for case in CASES:
        small = msgspec.structs.replace(case, requests=min(case.requests, 64), clients=min(case.clients, 8))
        while True:
            try:
                load.ask(small, peer.address, work)
                break
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def _memory(peer: Peer) -> Figure:
    until_sync(lambda: idle.accepts(peer), bool, within_s=READY_WITHIN_S)
    mib = load.memory_kib(peer.pid) / 1024
    return figure("proxy.memory_mb_idle", mib, "MiB", n=1, meaning="resident, before the first load")


def _cost(case: Case, all_peers: Sequence[Peer], work: Path) -> list[Figure]:
    cpu: dict[str, list[float]] = {peer.name: [] for peer in all_peers}
    for run in range(RUNS):
        sys.stderr.write(f"==> proxy: {case.name}, run {run + 1} of {RUNS}\n")
        for peer in all_peers:
            cpu[peer.name].append(load.run(case, peer, work).cpu_us)
    medians = {name: statistics.median(samples) for name, samples in cpu.items()}
    spread = {name: f"{min(samples):.1f}–{max(samples):.1f}" for name, samples in cpu.items()}
    found: list[Figure] = []
    for other in (name for name in medians if name != OURS):
        first = other == BASELINES.get(case.name, "haproxy")
        name = f"cpu_us_{case.name}" if first else f"cpu_us_{case.name}_vs_{other}"
        meaning = f"{case.meaning}, beside {other}; {spread[OURS]} against {spread[other]}"
        found.append(
            figure(name, medians[OURS], "µs", n=RUNS * case.requests, baseline=medians[other], meaning=meaning)
        )
    return sorted(found, key=lambda one: len(one.name))


def _added(all_peers: Sequence[Peer], work: Path) -> list[Figure]:
    """What a proxy adds to the 99th percentile of a steady, light load, beside asking the app itself."""
    added: dict[str, list[float]] = {peer.name: [] for peer in all_peers}
    for run in range(LATENCY_RUNS):
        sys.stderr.write(f"==> proxy: latency, run {run + 1} of {LATENCY_RUNS}\n")
        direct = percentile(load.ask(LATENCY, peers.APP_ADDRESS, work, port=peers.APP_PORT), 99)
        for peer in all_peers:
            added[peer.name].append(percentile(load.run(LATENCY, peer, work).took_us, 99) - direct)
    medians = {name: statistics.median(samples) for name, samples in added.items()}
    spread = ", ".join(f"{name} {value:.0f}" for name, value in medians.items())
    meaning = f"added to the p99 of 2,000 requests a second, beside nginx; all: {spread}"
    return [
        figure("proxy.added_us_p99", medians[OURS], "µs", n=LATENCY_RUNS * LATENCY.requests, baseline=medians["nginx"],
               meaning=meaning)
    ]  # fmt: skip
