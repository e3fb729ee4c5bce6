"""Decisions of the placement planner over 10,000 nodes until a million machines are placed.

The fleet fills up to nine tenths, apps have one to fifty machines in one to five regions, and every decision is
taken from the fleet on, as control takes it.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Generator

from benchmarks.figures import Figure, figure, percentile
from pantala.planner.placement import Ask, Candidate, Fleet

NODES, REGIONS, ZONES = 10_000, 35, 3
MACHINES = 1_000_000
SIZES_MIB = (256, 256, 256, 512, 512, 1024, 2048)
NODE_MIB = (32_768, 65_536, 131_072)


def measure() -> list[Figure]:
    dice = random.Random(1)
    fleet = Fleet(_node(number, dice) for number in range(NODES))
    asks = _asks(dice)
    took: list[float] = []
    begun = time.perf_counter()
    placed = 0
    while placed < MACHINES:
        ask, present = next(asks)
        before = time.perf_counter()
        node = fleet.choose(ask)
        fleet.take(node.id, ask)
        took.append((time.perf_counter() - before) * 1000)
        present[node.id] += 1
        placed += 1
        if placed % 100_000 == 0:
            sys.stderr.write(f"    {placed} machines after {time.perf_counter() - begun:.0f} s\n")
    rate = 1000 * len(took) / sum(took)
    meaning = f"{MACHINES} machines onto {NODES} nodes in {REGIONS} regions"
    return [
        figure("placement.decisions", rate, "1/s", n=len(took), meaning=meaning),
        figure("placement.decision_p99", percentile(took, 99), "ms", n=len(took), meaning="one decision"),
    ]


def _node(number: int, dice: random.Random) -> Candidate:
    memory_mib = dice.choice(NODE_MIB)
    return Candidate(
        id=f"node-{number:05}",
        region=f"r{number % REGIONS:02}",
        zone=f"z{dice.randrange(ZONES)}",
        reachable=dice.random() > 0.01,
        draining=dice.random() < 0.01,
        isolation="vm",
        cpus_free=memory_mib / 2048,
        memory_mib=memory_mib,
        memory_mib_free=memory_mib,
        disk_mib_free=1 << 20,
        orgs=frozenset(),
    )


def _asks(dice: random.Random) -> Generator[tuple[Ask, Counter[str]]]:
    """An ask and the count of its app's machines by node, which the caller keeps up."""
    while True:
        regions = frozenset(f"r{region:02}" for region in dice.sample(range(REGIONS), dice.randint(1, 5)))
        present: Counter[str] = Counter()
        memory_mib, org = dice.choice(SIZES_MIB), dice.randrange(20_000)
        for _ in range(dice.randint(1, 50)):
            yield (
                Ask(org=org, regions=[regions], cpus=1, shared_cpu=True, memory_mib=memory_mib, present=present),
                present,
            )
