"""Which node gets a new machine. Pure: nodes as control last saw them and what is asked go in, a node comes out.

The node itself checks again when it is asked (views may be stale); a refusal comes back here as `refused`, and the next
best is taken. Called by `control/machines.py`; `make bench NAME=placement` fills 10,000 nodes with a million machines.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from pantala.domain.guests import isolates
from pantala.errors import CapacityError

SHARED_CPU_FRACTION = 1 / 16
"""What a shared CPU is guaranteed: 5 ms of each 80 ms (Fly.io's documentation of CPU performance)."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node and what matters of it here. `orgs`: whose machines run there. `reachable`: it was heard lately."""

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
    orgs: frozenset[int]

    @property
    def free_share(self) -> float:
        return self.memory_mib_free / max(self.memory_mib, 1)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """`regions`: sets in order of preference; within a set regions are equal. `refused`: nodes that said no to this
    machine. `shared_kernel`: the operator lets orgs share a kernel. `present`: how many machines of the same app each
    node has. `volume_nodes`: where the volume that it needs is; None when it needs none. `isolation`: what must at
    least keep it apart from others; empty when any will do."""

    org: int
    regions: Sequence[frozenset[str]]
    cpus: int
    shared_cpu: bool
    memory_mib: int
    disk_mib: int = 0
    shared_kernel: bool = False
    refused: frozenset[str] = frozenset()
    present: Mapping[str, int] = {}
    volume_nodes: frozenset[str] | None = None
    isolation: str = ""

    def cpus_needed(self) -> float:
        return self.cpus * (SHARED_CPU_FRACTION if self.shared_cpu else 1.0)

    def describe(self) -> str:
        kind = "shared" if self.shared_cpu else "performance"
        asked = f", isolation {self.isolation}" if self.isolation else ""
        return f"{self.cpus} {kind} CPU{'s' if self.cpus > 1 else ''}, {self.memory_mib} MiB{asked}"


CONSTRAINTS = {
    "region": "in another region",
    "reachable": "not answering",
    "draining": "being drained",
    "refused": "refused it",
    "volume": "without its volume",
    "memory": "without enough free memory",
    "cpu": "without enough free CPU",
    "disk": "without enough free disk",
    "weaker": "whose isolation is weaker than asked for",
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
    if ask.volume_nodes is not None and node.id not in ask.volume_nodes:
        return "volume"
    if not isolates(node.isolation, ask.isolation):
        return "weaker"
    if node.memory_mib_free < ask.memory_mib:
        return "memory"
    if node.cpus_free < ask.cpus_needed():
        return "cpu"
    if node.disk_mib_free < ask.disk_mib:
        return "disk"
    if node.isolation != "vm" and not ask.shared_kernel and node.orgs - {ask.org}:
        return "isolation"
    return None


class Fleet:
    """All nodes, kept in order by zone so that a choice looks at few of them."""

    def __init__(self, nodes: Iterable[Candidate] = ()) -> None:
        self._nodes: dict[str, Candidate] = {}
        self._zones: defaultdict[str, dict[str, list[tuple[float, str]]]] = defaultdict(dict)
        for node in nodes:
            self.put(node)

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, node_id: str) -> Candidate:
        return self._nodes[node_id]

    def copy(self) -> Fleet:
        """To try things on."""
        return Fleet(self._nodes.values())

    def put(self, node: Candidate) -> None:
        """What is known of a node now."""
        self.remove(node.id)
        self._nodes[node.id] = node
        insort(self._zones[node.region].setdefault(node.zone, []), _place(node))

    def remove(self, node_id: str) -> None:
        node = self._nodes.pop(node_id, None)
        if node is not None:
            order = self._zones[node.region][node.zone]
            del order[bisect_left(order, _place(node))]

    def take(self, node_id: str, ask: Ask) -> None:
        """A machine was sent there: its room is gone, although the node has not said so yet."""
        node = self._nodes[node_id]
        self.put(
            msgspec.structs.replace(
                node,
                cpus_free=node.cpus_free - ask.cpus_needed(),
                memory_mib_free=node.memory_mib_free - ask.memory_mib,
                disk_mib_free=node.disk_mib_free - ask.disk_mib,
                orgs=node.orgs | {ask.org},
            )
        )

    def choose(self, ask: Ask) -> Candidate:
        """The best node. Raises CapacityError with the count of nodes by the constraint that excluded them.

        Regions in the order asked for; then away from the app's other machines (node, then zone); then where the
        largest share of memory is free; then by id, so that the same view gives the same answer.
        """
        in_zone: Counter[tuple[str, str]] = Counter()
        for node_id, machines in ask.present.items():
            if machines and (node := self._nodes.get(node_id)):
                in_zone[node.region, node.zone] += machines
        for regions in ask.regions:
            if (
                node := self._without_the_app(ask, regions, in_zone) or self._beside_it(ask, regions, in_zone)
            ) is not None:
                return node
        excluded = Counter(reason for node in self._nodes.values() if (reason := excluded_by(ask, node)))
        raise CapacityError(_refusal(ask, excluded), excluded=dict(excluded), hint=_hint(excluded))

    def _without_the_app(
        self, ask: Ask, regions: Iterable[str], in_zone: Mapping[tuple[str, str], int]
    ) -> Candidate | None:
        """The best node that has no machine of the app: usually the first of its zone."""
        found: list[tuple[int, tuple[float, str], Candidate]] = []
        for region in regions:
            for zone, order in self._zones.get(region, {}).items():
                node = next(self._fitting(ask, order), None)
                if node is not None:
                    found.append((in_zone.get((region, zone), 0), _place(node), node))
        return min(found)[2] if found else None

    def _fitting(self, ask: Ask, order: Sequence[tuple[float, str]]) -> Iterator[Candidate]:
        for _, node_id in order:
            if not ask.present.get(node_id):
                node = self._nodes[node_id]
                if excluded_by(ask, node) is None:
                    yield node

    def _beside_it(self, ask: Ask, regions: frozenset[str], in_zone: Mapping[tuple[str, str], int]) -> Candidate | None:
        """The best of the nodes that have machines of the app already."""
        nodes = (self._nodes.get(node_id) for node_id, machines in ask.present.items() if machines)
        fitting = [n for n in nodes if n is not None and n.region in regions and excluded_by(ask, n) is None]

        def rank(node: Candidate) -> tuple[int, int, tuple[float, str]]:
            return (ask.present[node.id], in_zone[node.region, node.zone], _place(node))

        return min(fitting, key=rank, default=None)


def _place(node: Candidate) -> tuple[float, str]:
    return (-node.free_share, node.id)


def _refusal(ask: Ask, excluded: Counter[str]) -> str:
    wanted = ", ".join(sorted(set[str]().union(*ask.regions))) or "no region"
    counts = "; ".join(f"{excluded[key]} {words}" for key, words in CONSTRAINTS.items() if excluded[key])
    return f"no host can take this machine ({ask.describe()}) in {wanted}: {counts or 'there are no hosts'}"


def _hint(excluded: Counter[str]) -> str | None:
    if excluded["weaker"]:
        return "`pantala doctor` says what a host can run; leave guest.isolation out to take what there is"
    if excluded["memory"] or excluded["cpu"]:
        return "ask for a smaller guest, another region, or stop machines that are not needed"
    if excluded["region"] and sum(excluded.values()) == excluded["region"]:
        return "ask for a region in which there are hosts"
    return None
