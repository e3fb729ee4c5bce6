"""The edge key: certificate keys are sealed to it, so that only edges can open them. Changed when an edge leaves.

Control keeps the private half because it seals it to each edge that joins. It is in the database, sealed to the
cluster key, rather than in a file: then a change is one transaction with the edge's leaving, and servers that share
the database share the key.
"""

from __future__ import annotations

import os

from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.kit.sealing import Opener, b64, seal, unb64
from pantala.store import hosts
from pantala.store.records import EdgeKeyRecord, NodeRecord
from pantala.wire.catalogue import EdgeKeyRow

SEALED_MAX = 10_000


class EdgeKeys:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._sealed: dict[tuple[int, str], str] = {}

    async def public(self) -> str:
        """The half to seal to; the first key is made when there is none."""
        record = await self._context.db.read(hosts.find_edge_key) or await self._context.db.write(self.ensure)
        return record.public_key

    def ensure(self, connection: Connection) -> EdgeKeyRecord:
        return hosts.find_edge_key(connection) or self.rotate(connection)

    def rotate(self, connection: Connection) -> EdgeKeyRecord:
        """Within the caller's transaction."""
        private = os.urandom(32)
        hosts.insert_edge_key(
            connection,
            public_key=Opener(private).public_key,
            sealed_key=self._context.key.seal(b64(private).encode()),
            now_ms=self._context.now_ms(),
        )
        made = hosts.find_edge_key(connection)
        assert made is not None
        return made

    def sealed_to(self, record: EdgeKeyRecord, sealing_key: str) -> str:
        """The private half (32 bytes) for one node. Kept: sealing twice gives two texts, and a row must not change for
        nothing."""
        known = self._sealed.get((record.id, sealing_key))
        if known is None:
            known = seal(sealing_key, unb64(self._context.key.open(record.sealed_key).decode()))
            if len(self._sealed) >= SEALED_MAX:
                self._sealed.pop(next(iter(self._sealed)))
            self._sealed[record.id, sealing_key] = known
        return known

    def row(self, record: EdgeKeyRecord, node: NodeRecord) -> EdgeKeyRow:
        return EdgeKeyRow(
            node=node.id, public_key=record.public_key, sealed_key=self.sealed_to(record, node.sealing_key)
        )
