"""What it costs to keep where each request spent its time: a proxy that does beside one that does not, asked in turns.

Both are the same program on the same core; the client and the app share the other. The figure is the median of CPU for
a request, the ratio that of the pairs: what disturbs the machine for a while disturbs both of a pair.
"""

from __future__ import annotations

import os
import statistics
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

RUNS = int(os.environ.get("BENCH_RUNS", "15"))
CASES = [
    Case(name="http1", meaning="HTTP/1.1 keep-alive, 1 KiB", requests=20_000, clients=32),
    Case(name="http2", meaning="HTTP/2 over TLS, 8 streams a connection, 1 KiB", requests=20_000, clients=8, tls=True,
         http2=True, streams=8),
]  # fmt: skip
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
        return [_cost(case, kept, not_kept, work) for case in CASES]


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
