"""What ends copies that this host should not have any more, as its own view of the catalogue tells it.

Two facts do: another host shows a newer generation of a machine, or this host's own member row is gone (it was removed
or declared lost). Both are journaled before anything is done about them (`Host.fence`), so an agent that dies here goes
on; a missing member row counts only once it has been seen, because a view that is merely young has none either.
Control says the same by node calls; whoever comes first wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import structlog

from pantala.agent.host import Host
from pantala.catalogue import View
from pantala.errors import PantalaError
from pantala.journal import Change, Journal
from pantala.wire.feed import FeedRow

log = structlog.get_logger()

RETRY_S = 1.0


class Fencing:
    """Made before the view is filled, `open` after it was filled from disk, `run` once the machines are adopted."""

    def __init__(self, view: View, journal: Journal, *, node: str) -> None:
        self._view = view
        self._journal = journal
        self._node = node
        self._member_key = f"member/{node}"
        self._seen = False
        self._seen_kept = False
        self._void = False
        self._newer: dict[str, int] = {}
        self._changed = anyio.Event()
        view.listen(self._hear)

    @property
    def _seen_mark(self) -> str:
        return f"member/{self._node}"

    async def open(self) -> None:
        """An agent may have died between hearing that its host was lost and writing it down."""
        marks = await self._journal.fences()
        self._seen_kept = self._seen_mark in marks
        members = [row.key for row in self._view.all() if row.stream == "nodes" and row.key.startswith("member/")]
        if self._seen_kept and members and self._member_key not in members:
            await self._journal.commit(Change(fence=(f"node/{self._node}", 1)))

    def newest(self, machine_id: str) -> int:
        """The generation that another host shows of a machine; 0 when none does."""
        row = self._view.get("routes", f"m/{machine_id}")
        return int(row["generation"]) if row is not None and row["node"] != self._node else 0

    async def run(self, host: Host) -> None:
        while True:
            try:
                await self._act(host)
            except PantalaError as error:
                log.exception("machines could not be fenced; tried again", error=error.message)
                await host.context.clock.sleep(RETRY_S)
                continue
            await self._changed.wait()

    async def _act(self, host: Host) -> None:
        self._changed = anyio.Event()
        if self._seen and not self._seen_kept:
            await self._journal.commit(Change(fence=(self._seen_mark, 1)))
            self._seen_kept = True
        if self._void:
            if not host.is_void:
                log.error("this host belongs to the cluster no more; its machines end", node=self._node)
            await host.fence_all()
            self._void = False
        while self._newer:
            machine_id, generation = next(iter(self._newer.items()))
            task = host.machines.get(machine_id)
            if task is not None and task.record.generation < generation:
                await host.fence(machine_id, generation)
            if self._newer.get(machine_id) == generation:
                del self._newer[machine_id]

    def _hear(self, revision: int, rows: Sequence[FeedRow]) -> None:
        """Called while rows are applied; `run` does the rest."""
        del revision
        for row in rows:
            if row.stream == "routes" and row.key.startswith("m/"):
                machine_id = row.key.removeprefix("m/")
                if (generation := self.newest(machine_id)) > 1:
                    self._newer[machine_id] = max(generation, self._newer.get(machine_id, 0))
                    self._changed.set()
            elif row.stream == "nodes" and row.key == self._member_key:
                self._void = self._void or (row.value is None and (self._seen or self._seen_kept))
                self._seen = self._seen or row.value is not None
                self._changed.set()
