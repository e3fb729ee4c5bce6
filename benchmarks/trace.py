"""What it costs to keep where each request spent its time: a proxy that does beside one that does not, asked in turns.

Both are the same program on the same core; the client and the app share the other. The figure is the median of CPU for
a request, the ratio that of the pairs: what disturbs the machine for a while disturbs both of a pair. Where valgrind is
installed the instructions of a request are counted as well, which nothing disturbs: those of the proxy's own code, a
quarter of its CPU; the kernel's are the same with records and without.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks import idle, load, peers
from benchmarks.figures import Figure, figure
from benchmarks.load import Case
from pantala.testing.authority import Authority
from pantala.testing.poll import until_sync
from pantala.wire.feed import ProxySettings

RUNS = int(os.environ.get("BENCH_RUNS", "41"))
CASES = [
    Case(name="http1", meaning="HTTP/1.1 keep-alive, 1 KiB", requests=6_000, clients=32),
    Case(name="http2", meaning="HTTP/2 over TLS, 8 streams a connection, 1 KiB", requests=6_000, clients=8, tls=True,
         http2=True, streams=8),
]  # fmt: skip
COUNTED = (1_000, 5_000)
COUNTED_WITHIN_S = 60.0
KEPT_MIB = next(f.default for f in msgspec.structs.fields(ProxySettings) if f.name == "trace_mib_max")


def measure() -> list[Figure]:
    if absent := [name for name in ("nginx", "h2load") if peers.find(name) is None]:
        raise SystemExit(f"not installed: {', '.join(absent)} (scripts/install --bench)")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pantala-bench-")))
        work.chmod(0o755)
        stack.enter_context(peers.app(work))
        authority = Authority()

        def proxy(name: str, index: int, mib_max: int) -> peers.Peer:
            def command(setup: peers.Setup) -> list[str]:
                return peers.pantala(setup, trace_mib_max=mib_max)

            peer = stack.enter_context(peers.running_as(name, command, index, work, authority))
            until_sync(lambda: idle.accepts(peer), bool, within_s=20.0)
            return peer

        kept, not_kept = proxy("kept", 21, KEPT_MIB), proxy("not-kept", 22, 0)
        figures = [_cost(case, kept, not_kept, work) for case in CASES]
        if peers.find("valgrind") is None:
            sys.stderr.write("==> trace: valgrind is not installed, so instructions are not counted\n")
            return figures
        return [*figures, _instructions(work, authority)]


def _cost(case: Case, kept: peers.Peer, not_kept: peers.Peer, work: Path) -> Figure:
    warm = msgspec.structs.replace(case, requests=2_000)
    for peer in (kept, not_kept):
        load.run(warm, peer, work)
    pairs: list[tuple[float, float]] = []
    for run in range(RUNS):
        sys.stderr.write(f"==> trace: {case.name}, run {run + 1} of {RUNS}\n")
        # Whoever comes second finds the caches as the first one left them.
        order = (kept, not_kept) if run % 2 else (not_kept, kept)
        cpu = {peer.name: load.run(case, peer, work).cpu_us for peer in order}
        pairs.append((cpu[kept.name], cpu[not_kept.name]))
    ratios = [one / other for one, other in pairs]
    ratio = statistics.median(ratios)
    quarter = statistics.quantiles(ratios, n=4)
    with_records, without = (statistics.median(side) for side in zip(*pairs, strict=True))
    meaning = (
        f"{case.meaning}: records of requests kept, beside none; {without:.2f} without, "
        f"pairs {quarter[0]:.3f}–{quarter[2]:.3f}"
    )
    return figure(
        f"trace.cpu_us_{case.name}",
        with_records,
        "µs",
        n=RUNS * case.requests,
        baseline=with_records / ratio,
        meaning=meaning,
    )


def _instructions(work: Path, authority: Authority) -> Figure:
    """Of two runs of different length: what the program does at its start and end is in both."""

    def of_one(mib_max: int) -> float:
        fewer, more = (_count(work / f"counted-{mib_max}-{n}", mib_max, n, authority) for n in COUNTED)
        return (more - fewer) / (COUNTED[1] - COUNTED[0])

    without, with_records = of_one(0), of_one(KEPT_MIB)
    return figure(
        "trace.instructions_http1",
        with_records,
        "instructions",
        n=sum(COUNTED),
        baseline=without,
        meaning="HTTP/1.1 keep-alive, 1 KiB: the proxy's own instructions for a request, beside those without records",
    )


def _count(folder: Path, mib_max: int, requests: int, authority: Authority) -> int:
    sys.stderr.write(f"==> trace: counting the instructions of {requests} requests, {mib_max} MiB of records\n")
    folder.mkdir(mode=0o755)
    issued = authority.issue(peers.NAME)
    setup = peers.Setup(address="127.0.4.23", folder=folder, chain_pem=issued.chain_pem, key_pem=issued.key_pem)
    counter = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={folder}/counts"]
    log = folder / "log"
    with log.open("wb") as out:
        command = ["taskset", "-c", str(peers.PROXY_CORE), *counter, *peers.pantala(setup, trace_mib_max=mib_max)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            peer = peers.Peer(name="counted", address=setup.address, pid=process.pid)
            until_sync(lambda: idle.accepts(peer), bool, within_s=COUNTED_WITHIN_S)
            case = Case(name="http1", meaning="", requests=requests, clients=8)
            load.ask(case, setup.address, work=folder)
            process.send_signal(signal.SIGTERM)
            process.wait(COUNTED_WITHIN_S)
        finally:
            process.kill()
            process.wait()
    found = re.search(r"I\s+refs:\s+([\d,]+)", log.read_text(errors="replace"))
    if found is None:
        raise AssertionError(f"valgrind did not count: {log.read_text(errors='replace')[-500:]}")
    return int(found[1].replace(",", ""))
