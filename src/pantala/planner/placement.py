"""Which node gets a new machine. Pure: nodes as control last saw them and what is asked go in, a node comes out.

The node itself checks again when it is asked (views may be stale); a refusal comes back here as `refused`, and the next
best is taken. Called by `control/machines.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from pantala.errors import CapacityError

SHARED_CPU_FRACTION = 1 / 16
"""What a shared CPU is guaranteed: 5 ms of each 80 ms (`machines.md` section 10)."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node and what matters of it here. `app_machines`: machines of the same app on it. `orgs`: whose machines run
    there. `reachable`: it answered lately."""

    id: str
    region: str
    zone: str
    reachable: bool
    draining: bool
    isolation: str
    cpus_free: float
    memory_mib: int
    memory_mib_free: int
    disk_mib_free: int
    app_machines: int
    orgs: frozenset[int]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """`regions`: sets in order of preference; within a set regions are equal. `refused`: nodes that said no to this
    machine. `shared_kernel`: the operator lets orgs share a kernel."""

    org: int
    regions: Sequence[frozenset[str]]
    cpus: int
    shared_cpu: bool
    memory_mib: int
    disk_mib: int = 0
    shared_kernel: bool = False
    refused: frozenset[str] = frozenset()

    def cpus_needed(self) -> float:
        return self.cpus * (SHARED_CPU_FRACTION if self.shared_cpu else 1.0)

    def describe(self) -> str:
        kind = "shared" if self.shared_cpu else "performance"
        return f"{self.cpus} {kind} CPU{'s' if self.cpus > 1 else ''}, {self.memory_mib} MiB"


CONSTRAINTS = {
    "region": "in another region",
    "reachable": "not answering",
    "draining": "being drained",
    "refused": "refused it",
    "memory": "without enough free memory",
    "cpu": "without enough free CPU",
    "disk": "without enough free disk",
    "isolation": "whose kernel another organisation uses",
}


def excluded_by(ask: Ask, node: Candidate) -> str | None:
    """The first constraint (a key of `CONSTRAINTS`) that rules a node out, or None when it may take the machine."""
    if not any(node.region in regions for regions in ask.regions):
        return "region"
    if not node.reachable:
        return "reachable"
    if node.draining:
        return "draining"
    if node.id in ask.refused:
        return "refused"
    if node.memory_mib_free < ask.memory_mib:
        return "memory"
    if node.cpus_free < ask.cpus_needed():
        return "cpu"
    if node.disk_mib_free < ask.disk_mib:
        return "disk"
    if node.isolation != "vm" and not ask.shared_kernel and node.orgs - {ask.org}:
        return "isolation"
    return None


def choose(ask: Ask, nodes: Iterable[Candidate]) -> Candidate:
    """The best node. Raises CapacityError with the count of nodes by the constraint that excluded them.

    Regions in the order asked for; then away from the app's other machines (node, then zone); then where most memory
    stays free; then by id, so that the same view gives the same answer.
    """
    fitting: list[Candidate] = []
    excluded: Counter[str] = Counter()
    known = list(nodes)
    for node in known:
        reason = excluded_by(ask, node)
        if reason is None:
            fitting.append(node)
        else:
            excluded[reason] += 1
    if not fitting:
        raise CapacityError(_refusal(ask, excluded), excluded=dict(excluded), hint=_hint(excluded))
    in_zone: Counter[tuple[str, str]] = Counter()
    for node in known:
        in_zone[node.region, node.zone] += node.app_machines

    def rank(node: Candidate) -> tuple[int, int, int, float, str]:
        preference = next(index for index, regions in enumerate(ask.regions) if node.region in regions)
        kept_free = (node.memory_mib_free - ask.memory_mib) / max(node.memory_mib, 1)
        return (preference, node.app_machines, in_zone[node.region, node.zone], -kept_free, node.id)

    return min(fitting, key=rank)


def _refusal(ask: Ask, excluded: Counter[str]) -> str:
    wanted = ", ".join(sorted(set[str]().union(*ask.regions))) or "no region"
    counts = "; ".join(f"{excluded[key]} {words}" for key, words in CONSTRAINTS.items() if excluded[key])
    return f"no host can take this machine ({ask.describe()}) in {wanted}: {counts or 'there are no hosts'}"


def _hint(excluded: Counter[str]) -> str | None:
    if excluded["memory"] or excluded["cpu"]:
        return "ask for a smaller guest, another region, or stop machines that are not needed"
    if excluded["region"] and sum(excluded.values()) == excluded["region"]:
        return "ask for a region in which there are hosts"
    return None
