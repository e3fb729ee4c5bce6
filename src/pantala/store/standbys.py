"""Statements about standby machines and the takeovers that are not done yet.

A takeover is written in the transaction that gives the watched machine a new generation, so its old copy can never
serve again when the standby starts.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from sqlalchemy import Connection, delete, insert, select

from pantala.store import moves
from pantala.store.records import PlacementRecord, TakeoverRecord, many
from pantala.store.schema import placements, takeovers


def list_standbys(connection: Connection) -> list[tuple[PlacementRecord, list[str]]]:
    """Every machine that stands by, oldest first, with those it watches."""
    mine = (
        placements.c.tombstone.is_(False)
        & (placements.c.phase == "placed")
        & placements.c.config.contains('"standbys"')
    )
    order = (placements.c.created_at_ms, placements.c.machine_id)
    found = many(connection, select(placements).where(mine).order_by(*order), PlacementRecord)
    watching = [(placement, list(msgspec.json.decode(placement.config).get("standbys") or [])) for placement in found]
    return [(placement, watched) for placement, watched in watching if watched]


def take_over(
    connection: Connection, node: str, *, members: Collection[str], running: Collection[str], now_ms: int
) -> set[str]:
    """Before `node` leaves for good: for each of its machines of which `running` says that it ran, one standby on a
    host of `members` that does not run takes over. The machines whose place is taken; they must not be started."""
    mine = {placement.machine_id for placement in moves.list_placed_on(connection, node)} & set(running)
    taken: set[str] = set()
    busy = {record.standby_id for record in list_takeovers(connection)} | set(running)
    for standby, watched in list_standbys(connection):
        lost = next((machine_id for machine_id in watched if machine_id in mine - taken), None)
        if lost is None or standby.machine_id in busy or standby.node == node or standby.node not in members:
            continue
        row = {"standby_id": standby.machine_id, "watched_id": lost, "since_ms": now_ms}
        connection.execute(insert(takeovers).values(**row))
        taken.add(lost)
    return taken


def list_takeovers(connection: Connection) -> list[TakeoverRecord]:
    return many(connection, select(takeovers).order_by(takeovers.c.since_ms, takeovers.c.standby_id), TakeoverRecord)


def end_takeover(connection: Connection, standby_id: str) -> None:
    connection.execute(delete(takeovers).where(takeovers.c.standby_id == standby_id))
