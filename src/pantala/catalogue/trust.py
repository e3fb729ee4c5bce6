"""Whose words a reader believes: control's by the key that came with joining, a node's while control calls it a member.

A node's key is that of its `member/<id>` row in the view, so trust follows the catalogue itself: frames without a key
are refused, and `Trust.follow` has the replica drop what an owner said once its row is gone, and ask for what it has to
say once it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import structlog

from pantala.catalogue.replica import Replica
from pantala.catalogue.view import View
from pantala.wire.feed import FeedRow

log = structlog.get_logger()

STREAM, PREFIX = "nodes", "member/"


class Trust:
    """`pinned`: owners whose key this process knows by itself (control, and its own). `own`: this node's id."""

    def __init__(self, view: View, pinned: Mapping[str, str], *, own: str = "") -> None:
        self._view = view
        self._pinned = dict(pinned)
        self._own = own
        self._vouched: dict[str, str] = {}
        self._void: set[str] = set()
        self._fresh: set[str] = set()
        self._changed = anyio.Event()
        view.listen(lambda _, rows: self._hear(rows))
        self._hear(view.all())

    def key_of(self, owner: str) -> str | None:
        return self._pinned.get(owner) or self._vouched.get(owner)

    def others(self) -> list[str]:
        """The members but this one; each holds the others' rows."""
        return [node for node in self._vouched if node != self._own]

    async def follow(self, replica: Replica) -> None:
        """For ever. What is void goes first: it must not wait for an owner that is being asked."""
        while True:
            self._changed = anyio.Event()
            while self._void:
                owner = self._void.pop()
                await replica.forget(owner)
                log.info("no member any more; what it said is dropped", owner=owner)
            while self._fresh:
                replica.expect(self._fresh.pop())
            await self._changed.wait()

    def _hear(self, rows: Sequence[FeedRow]) -> None:
        """Called while rows are applied: the key counts at once, the rest is `follow`'s."""
        for row in rows:
            if row.stream != STREAM or not row.key.startswith(PREFIX):
                continue
            owner = row.key.removeprefix(PREFIX)
            key = str(row.value["verify_key"]) if row.value is not None else None
            before = self._vouched.get(owner)
            if key == before:
                continue  # only its address or status changed
            if before is not None:
                del self._vouched[owner]
                self._void.add(owner)
            self._fresh.discard(owner)
            if key is not None:
                self._vouched[owner] = key
                self._fresh.add(owner)
            self._changed.set()
