"""What control knows of nodes: which there are (table nodes), what they have free (their rows in the catalogue).

No node is asked when a machine is placed, unless none has room by its rows: they are some seconds old, and what has
ended since may have left some. The fleet follows the rows as they come; what was sent since a node's last row is taken
off what it said, and a node that has not been heard for some of its beats does not count as answering. The node itself
checks again and may refuse.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from itertools import islice

import anyio
import structlog
from msgspec.structs import replace
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.control.ports import Sightings
from pantala.errors import CapacityError, DiskFull, InternalError, PantalaError
from pantala.planner.placement import Ask, Candidate, Fleet, excluded_by
from pantala.store import hosts, machines
from pantala.store.records import NodeRecord
from pantala.wire.feed import MachineRow, NodeRow
from pantala.wire.node import GetNode, NodeInfo

log = structlog.get_logger()

FRESH_S, FRESH_BEATS = 10.0, 3.0
"""So long, and so many beats, a node counts as answering after its last word."""
UNHEARD_S, UNHEARD_BEATS = 3.0, 1.25
"""After a start the rows kept from before count for this long, until nodes have had time to say something."""
SQL_FRESH_S = 5.0
ORGS_FRESH_S = 60.0
"""Whose machines a node has is counted over all placements. What is placed here is added at once; what was destroyed
leaves a node closed to other orgs for so long at most, unless a machine found no place."""
SENT_KEPT_S = 10.0
"""A node whose figures did not change says nothing; what was sent to it counts no longer than this."""
LOOKED_AT_MAX = 16
LOOK_WITHIN_S, LOOK_EVERY_S, LOOK_AGAIN_S = 2.0, 0.5, 10.0
"""Nodes that are asked what they have free when none seems to have room: how long they have, how often one is asked,
and when one is that did not answer."""
SILENT_S, SILENT_BEATS = 3.0, 3.0
"""A node that owes an answer and said nothing for so long, and so many beats, while others did, is not waited for."""
AVOIDED_S = 10.0
"""A node that did not answer a creation is asked for the next ones only where no other fits."""


class _Sent:
    """A machine on its way to a node. `until` is set once the node has answered."""

    __slots__ = ("ask", "until")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.until: float | None = None


class Nodes:
    def __init__(self, context: Context, sightings: Sightings) -> None:
        self._context = context
        self._sightings = sightings
        self._fleet = Fleet()
        self._members: dict[str, NodeRecord] = {}
        self._orgs: dict[str, set[int]] = {}
        self._answering: dict[str, bool] = {}
        self._sent: dict[str, list[_Sent]] = {}
        self._told: dict[str, NodeInfo] = {}
        """What nodes answered since their newest row."""
        self._look_due: dict[str, float] = {}
        self._looking = anyio.Lock()
        self._avoided: dict[str, float] = {}
        beat_s = context.settings.beat_s
        self._fresh_s = max(FRESH_S, FRESH_BEATS * beat_s)
        self._unheard_s = max(UNHEARD_S, UNHEARD_BEATS * beat_s)
        self._started_at = self._now()
        self._read_at: float | None = None
        self._orgs_read_at: float | None = None
        self._heard = anyio.Event()
        sightings.listen(self._hear)

    async def fleet(self) -> Fleet:
        """Every member with what it has free; those that were not heard lately are in it as such."""
        await self._read()
        if not any(self._answering.values()):
            await self._first_words()
        self._age()
        return self._fleet

    async def choose(self, ask: Ask) -> Candidate:
        """The best node for a machine. Raises CapacityError, then by what was counted and said lately."""
        await self.fleet()
        try:
            return self._best(ask)
        except CapacityError as error:
            stale = self._orgs_read_at is not None and self._now() - self._orgs_read_at > SQL_FRESH_S
            if error.excluded.get("isolation") and stale:
                self._read_at = self._orgs_read_at = None
            elif error.excluded.get("cpu") or error.excluded.get("memory"):
                await self._look_for_room(ask)
            else:
                raise
        await self.fleet()
        return self._best(ask)

    def _best(self, ask: Ask) -> Candidate:
        now = self._now()
        self._avoided = {node_id: until for node_id, until in self._avoided.items() if until > now}
        if self._avoided:
            with suppress(CapacityError):
                return self._fleet.choose(replace(ask, refused=ask.refused | self._avoided.keys()))
        return self._fleet.choose(ask)

    @contextmanager
    def sent(self, node_id: str, ask: Ask) -> Generator[None]:
        """While a machine is on its way to a node, and until the node says what it has free since: its room is gone."""
        one = _Sent(ask)
        self._sent.setdefault(node_id, []).append(one)
        self._put(node_id)
        refused = False
        try:
            yield
        except (CapacityError, DiskFull):
            refused = True
            raise
        finally:
            if refused:
                self._sent[node_id].remove(one)
            else:  # also when nobody knows: it may be there
                one.until = self._now() + SENT_KEPT_S
                self._orgs.setdefault(node_id, set()).add(ask.org)
            self._put(node_id)

    def avoid(self, node_id: str) -> None:
        """It did not answer a creation."""
        self._avoided[node_id] = self._now() + AVOIDED_S

    def is_better_left(self, node_id: str, ask: Ask) -> bool:
        """It says nothing at all while others do (we may be slow to listen ourselves), so an answer that it owes will
        not come either; and another one has room."""
        heard = {other: self._sightings.heard_at(other) or self._started_at for other in {node_id, *self._members}}
        behind_s = max(heard.values()) - heard[node_id]
        if behind_s <= max(SILENT_S, SILENT_BEATS * self._context.settings.beat_s):
            return False
        with suppress(CapacityError):
            self._fleet.choose(replace(ask, refused=ask.refused | {node_id}))
            return True
        return False

    def clock_ms(self, node_id: str, *, in_s: float) -> int:
        """What the node's own clock will show in so many seconds; 0 when it has not said what it shows."""
        ahead_ms = self._sightings.ahead_ms(node_id)
        return 0 if ahead_ms is None else ahead_ms + int((self._now() + in_s) * 1000)

    def changed(self) -> None:
        """The table nodes was written: read it before the next choice."""
        self._read_at = None

    def answering(self, node_id: str) -> NodeRow | None:
        """What a node says of itself; None when it was not heard lately."""
        return self._sightings.node(node_id) if self._answers(node_id) else None

    def machine(self, machine_id: str) -> MachineRow | None:
        """As its host shows it."""
        return self._sightings.machine(machine_id)

    async def sealing_key(self, node_id: str) -> str:
        """The key that this node joined with, and opens secrets with."""
        node = await self._context.db.read(lambda c: hosts.find_node(c, node_id))
        if node is None:
            raise InternalError(f"the node {node_id} is not known")
        return node.sealing_key

    async def regions(self) -> tuple[list[str], str]:
        """Configured ones and those that hosts joined in, and the default one: the configured default, or where the
        first host is as long as the default has none."""
        await self._read()
        nodes = list(self._members.values())
        settings = self._context.settings
        codes = sorted({*settings.regions, *(node.region for node in nodes)})
        default = settings.default_region
        if nodes and all(node.region != default for node in nodes):
            default = min(nodes, key=lambda node: (node.created_at_ms, node.id)).region
        return codes, default

    async def capacity_by_region(self) -> dict[str, int]:
        """Regions that have nodes, with how many of the smallest machines (256 MiB) would fit now."""
        await self._read()
        found: dict[str, int] = {}
        for node in self._members.values():
            row = self.answering(node.id)
            found[node.region] = found.get(node.region, 0) + (row.memory_mib_free // 256 if row else 0)
        return found

    async def _look_for_room(self, ask: Ask) -> None:
        """Ask nodes that seem to have too little left what they have now."""
        asked_at = self._now()
        async with self._looking:  # who comes second finds what the first one was told
            due = (node_id for node_id in self._members if self._look_due.get(node_id, 0.0) <= asked_at)
            short = (one for one in due if excluded_by(ask, self._fleet.get(one)) in {"cpu", "memory"})
            async with anyio.create_task_group() as tasks:
                for node_id in list(islice(short, LOOKED_AT_MAX)):
                    tasks.start_soon(self._look, node_id)

    async def _look(self, node_id: str) -> None:
        """What an earlier look told stays when this one fails."""
        told = [one for one in self._sent.get(node_id, []) if one.until is not None]
        try:
            info: NodeInfo = await self._context.nodes.call(node_id, GetNode(), timeout_s=LOOK_WITHIN_S)
        except PantalaError as error:
            log.info("what a node has free is not known", node=node_id, reason=error.message)
            self._look_due[node_id] = self._now() + LOOK_AGAIN_S
            return
        self._look_due[node_id] = self._now() + LOOK_EVERY_S
        self._told[node_id] = info
        self._sent[node_id] = [one for one in self._sent.get(node_id, []) if one not in told]
        self._put(node_id)

    # -- keeping up ----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Members, and whose machines they have, from SQL; at most `SQL_FRESH_S` old."""
        now = self._now()
        if self._read_at is not None and now - self._read_at < SQL_FRESH_S:
            return
        orgs_read_at = self._orgs_read_at
        count = not self._context.settings.shared_kernel and (orgs_read_at is None or now - orgs_read_at > ORGS_FRESH_S)
        self._read_at = now
        if count:
            self._orgs_read_at = now

        def load(connection: Connection) -> tuple[list[NodeRecord], dict[str, set[int]] | None]:
            return hosts.list_nodes(connection), machines.orgs_by_node(connection) if count else None

        try:
            nodes, orgs = await self._context.db.read(load)
        except BaseException:
            self._read_at, self._orgs_read_at = None, orgs_read_at
            raise
        before, self._members = self._members, {node.id: node for node in nodes}
        had = self._orgs
        self._orgs = had if orgs is None else orgs
        for node_id in before.keys() | self._members.keys():
            same = before.get(node_id) == self._members.get(node_id)
            if not same or self._orgs.get(node_id) != had.get(node_id):
                self._put(node_id)

    def _hear(self, node_id: str) -> None:
        """A node said what it has free now."""
        self._told.pop(node_id, None)
        waiting = [one for one in self._sent.pop(node_id, []) if one.until is None]
        if waiting:
            self._sent[node_id] = waiting
        self._put(node_id)
        self._heard.set()

    async def _first_words(self) -> None:
        """Right after the start nobody may have been heard yet."""
        if any(self._sightings.heard_at(node_id) is not None for node_id in self._members):
            return
        with anyio.move_on_after(max(self._unheard_s - (self._now() - self._started_at), 0)):
            while not any(self._answers(node_id) for node_id in self._members):
                self._heard = anyio.Event()
                await self._heard.wait()

    def _age(self) -> None:
        """What changes by time alone: who is still heard, and whose sent machines count no longer."""
        now = self._now()
        for node_id, sent in list(self._sent.items()):
            kept = [one for one in sent if one.until is None or one.until > now]
            if len(kept) != len(sent):
                self._sent[node_id] = kept
                self._put(node_id)
        for node_id in self._members:
            if self._answers(node_id) != self._answering.get(node_id):
                self._put(node_id)

    def _answers(self, node_id: str) -> bool:
        if self._sightings.node(node_id) is None:
            return False
        heard_at = self._sightings.heard_at(node_id)
        if heard_at is None:
            return self._now() - self._started_at <= self._unheard_s
        return self._now() - heard_at <= self._fresh_s

    def _put(self, node_id: str) -> None:
        node = self._members.get(node_id)
        if node is None:
            self._fleet.remove(node_id)
            self._answering.pop(node_id, None)
            self._told.pop(node_id, None)
            self._look_due.pop(node_id, None)
            return
        answers = self._answering[node_id] = self._answers(node_id)
        row = self._sightings.node(node_id) if answers else None
        if row is not None and (told := self._told.get(node_id)) is not None:
            row = replace(row, cpus_free=told.cpus_free, memory_mib_free=told.memory_mib_free)
        self._fleet.put(_candidate(node, row, self._orgs.get(node_id, set())))
        for one in self._sent.get(node_id, []):
            self._fleet.take(node_id, one.ask)

    def _now(self) -> float:
        return self._context.clock.monotonic()


def _candidate(node: NodeRecord, row: NodeRow | None, orgs: set[int]) -> Candidate:
    return Candidate(
        id=node.id,
        region=node.region,
        zone=node.zone,
        reachable=row is not None,
        draining=node.status == "draining",
        isolation=row.isolation if row else "",
        cpus_free=row.cpus_free if row else 0.0,
        memory_mib=row.memory_mib if row else 0,
        memory_mib_free=row.memory_mib_free if row else 0,
        disk_mib_free=row.disk_mib_free if row else 0,
        orgs=frozenset(orgs),
    )
