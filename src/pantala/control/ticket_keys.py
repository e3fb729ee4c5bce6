"""Keys for TLS session tickets, the same at every edge, so that a client may resume at another edge than it began at.

A new one every eight hours, told well before it is used; each opens tickets for a day, so that the loss of one key
tells little. Owns the table ticket_keys.
"""

from __future__ import annotations

import os

import structlog
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.control.edge_keys import EdgeKeys
from pantala.control.publication import Publication
from pantala.errors import PantalaError
from pantala.kit.sealing import seal
from pantala.store import certificates

log = structlog.get_logger()

HOUR_MS = 3_600_000
EVERY_MS, LIVES_MS = 8 * HOUR_MS, 24 * HOUR_MS
AHEAD_MS = HOUR_MS
"""So long before its time a key is made: every edge has it by then."""
LOOK_EVERY_S = 60.0
KEY_BYTES = 32


class TicketKeys:
    def __init__(self, context: Context, publication: Publication, edge_keys: EdgeKeys) -> None:
        self._context = context
        self._publication = publication
        self._edge_keys = edge_keys

    async def run(self) -> None:
        while True:
            try:
                await self.ensure()
            except PantalaError:
                log.exception("ticket keys not changed")
            await self._context.clock.sleep(LOOK_EVERY_S)

    async def ensure(self) -> bool:
        """Make the next key if it is time, forget the ended, seal to the edge key in use; whether anything changed."""
        edge_key = await self._edge_keys.public()
        now_ms = self._context.now_ms()

        def change(connection: Connection) -> tuple[bool, list[int]]:
            known = certificates.list_ticket_keys(connection)
            kept = [record for record in known if record.not_after_ms >= now_ms]
            ended = [record.id for record in known if record.not_after_ms < now_ms]
            certificates.forget_ticket_keys(connection, before_ms=now_ms)
            stale = [record for record in kept if record.sealed_to != edge_key]
            for record in stale:
                sealed = seal(edge_key, self._context.key.open(record.kept_key))
                certificates.reseal_ticket_key(connection, record.id, sealed_key=sealed, sealed_to=edge_key)
            begins_ms = next_begins_ms([record.not_before_ms for record in kept], now_ms=now_ms)
            if begins_ms is not None:
                key = os.urandom(KEY_BYTES)
                certificates.insert_ticket_key(
                    connection,
                    kept_key=self._context.key.seal(key),
                    sealed_key=seal(edge_key, key),
                    sealed_to=edge_key,
                    not_before_ms=begins_ms,
                    not_after_ms=begins_ms + LIVES_MS,
                )
            return bool(stale or ended or begins_ms is not None), ended

        changed, ended = await self._context.db.write(change)
        if changed:
            await self._publication.publish_tickets(gone=ended)
        return changed


def next_begins_ms(begun_ms: list[int], *, now_ms: int) -> int | None:
    """When a key that is to be made now takes over; None while it is too early. `begun_ms`: of those that there are."""
    if not begun_ms:
        return now_ms
    due_ms = max(begun_ms) + EVERY_MS
    return max(due_ms, now_ms) if due_ms - AHEAD_MS <= now_ms else None
