"""Nodes as a reader that places machines sees them: what each says of itself, and when it was last heard.

Used by control (`control/nodes.py`), composed in `server/compose.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from pantala.catalogue.replica import Replica
from pantala.catalogue.view import View
from pantala.wire.feed import FeedRow, MachineRow, NodeRow

STREAM, PREFIX = "nodes", "node/"


class Sightings:
    """`listen`: called with a node's id whenever its row changes or is gone."""

    def __init__(self, view: View, replica: Replica) -> None:
        self._view = view
        self._replica = replica
        self._listeners: list[Callable[[str], None]] = []
        self._nodes: dict[str, NodeRow | None] = {}
        """As read from the view; each choice of a node looks at all of them."""
        view.listen(self._hear)

    def node(self, node_id: str) -> NodeRow | None:
        if node_id not in self._nodes:
            value = self._view.get(STREAM, f"{PREFIX}{node_id}")
            self._nodes[node_id] = None if value is None else msgspec.convert(value, NodeRow)
        return self._nodes[node_id]

    def machine(self, machine_id: str) -> MachineRow | None:
        value = self._view.get("routes", f"m/{machine_id}")
        return None if value is None else msgspec.convert(value, MachineRow)

    def heard_at(self, node_id: str) -> float | None:
        """Monotonic time; None when it has said nothing since this process runs."""
        return self._replica.heard_at.get(node_id)

    def ahead_ms(self, node_id: str) -> int | None:
        """What the node's clock shows more than our monotonic one; None while it has not said."""
        return self._replica.ahead_ms(node_id)

    def listen(self, on_change: Callable[[str], None]) -> None:
        self._listeners.append(on_change)

    def _hear(self, revision: int, rows: Sequence[FeedRow]) -> None:
        del revision
        for row in rows:
            if row.stream == STREAM and row.key.startswith(PREFIX):
                node_id = row.key.removeprefix(PREFIX)
                self._nodes.pop(node_id, None)
                for listener in self._listeners:
                    listener(node_id)
