"""Statements about machines on their way from one node to another. Every step is guarded and safe to repeat.

A generation is given out once: `begin` counts it up in the placement in the transaction that writes the move, before
any node hears of it.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from pantala.store.records import MoveRecord, PlacementRecord, find, many
from pantala.store.schema import moves, placements

UNDECIDED = ("choose", "prepare", "undo")
"""The source is the one that counts."""


def get_placement(connection: Connection, machine_id: str) -> PlacementRecord:
    found = find(connection, select(placements).where(placements.c.machine_id == machine_id), PlacementRecord)
    assert found is not None
    return found


def list_placed_on(connection: Connection, node: str) -> list[PlacementRecord]:
    """Machines that count on a node, oldest first."""
    mine = (placements.c.node == node) & placements.c.tombstone.is_(False)
    return many(
        connection,
        select(placements).where(mine).order_by(placements.c.created_at_ms, placements.c.machine_id),
        PlacementRecord,
    )


def list_moves(connection: Connection) -> list[MoveRecord]:
    """Started machines first, then in order of age."""
    order = (moves.c.launch.desc(), moves.c.created_at_ms, moves.c.machine_id, moves.c.generation)
    return many(connection, select(moves).order_by(*order), MoveRecord)


def begin(
    connection: Connection, machine_id: str, *, source: str, target: str | None, launch: bool, now_ms: int
) -> int | None:
    """The new generation; None when the machine is not (any more) on `source`, or is on its way already."""
    undecided = (moves.c.machine_id == machine_id) & moves.c.phase.in_(UNDECIDED)
    if connection.execute(select(moves.c.generation).where(undecided)).first() is not None:
        return None
    here = (placements.c.machine_id == machine_id) & (placements.c.node == source) & (placements.c.phase == "placed")
    counted = update(placements).where(here).values(generation=placements.c.generation + 1, updated_at_ms=now_ms)
    generation = connection.execute(counted.returning(placements.c.generation)).scalar_one_or_none()
    if generation is None:
        return None
    connection.execute(
        insert(moves).values(
            machine_id=machine_id,
            generation=generation,
            source=source,
            target=target,
            phase="choose" if target is None else "prepare",
            launch=launch,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
        )
    )
    return int(generation)


def aim(connection: Connection, move: MoveRecord, *, target: str, now_ms: int) -> bool:
    """A move without a target gets one."""
    return _step(connection, move, before="choose", after="prepare", now_ms=now_ms, target=target)


def step(connection: Connection, move: MoveRecord, *, before: str, after: str, now_ms: int) -> bool:
    """False when somebody else moved on."""
    return _step(connection, move, before=before, after=after, now_ms=now_ms)


def _step(
    connection: Connection, move: MoveRecord, *, before: str, after: str, now_ms: int, target: str | None = None
) -> bool:
    values = {"phase": after, "updated_at_ms": now_ms} | ({} if target is None else {"target": target})
    mine = _key(move) & (moves.c.phase == before)
    return connection.execute(update(moves).where(mine).values(**values)).rowcount == 1


def switch(connection: Connection, move: MoveRecord, *, region: str, snapshot: str, now_ms: int) -> bool:
    """From now on the copy on the target counts. False when the machine was destroyed, or moved otherwise, since."""
    here = (
        (placements.c.machine_id == move.machine_id)
        & (placements.c.node == move.source)
        & (placements.c.generation == move.generation)
        & (placements.c.phase == "placed")
    )
    moved = update(placements).where(here)
    values = {"node": move.target, "region": region, "snapshot": snapshot, "updated_at_ms": now_ms}
    if connection.execute(moved.values(**values)).rowcount != 1:
        return False
    return step(connection, move, before="prepare", after="publish", now_ms=now_ms)


def end(connection: Connection, move: MoveRecord) -> None:
    connection.execute(delete(moves).where(_key(move)))


def leave(
    connection: Connection, node: str, *, members: Collection[str], stopped: Collection[str], now_ms: int
) -> list[str]:
    """A node is gone for good: its machines get a new generation, those without volumes a move that looks for a new
    place (`stopped`: those that need not be started). The ids of those that stay lost. `members`: nodes that are
    left."""
    for move in list_moves(connection):
        if move.source == node and move.phase == "prepare":
            step(connection, move, before="prepare", after="undo", now_ms=now_ms)
        elif move.source == node and move.phase == "fence":
            end(connection, move)
        elif move.target == node and move.phase in UNDECIDED:
            end(connection, move)
            if move.source not in members:
                begin(connection, move.machine_id, source=move.source, target=None, launch=move.launch, now_ms=now_ms)
        elif move.target == node and move.phase == "publish":
            step(connection, move, before="publish", after="fence", now_ms=now_ms)
    lost: list[str] = []
    for placement in list_placed_on(connection, node):
        mine = placements.c.machine_id == placement.machine_id
        if placement.phase != "placed":  # nobody was told that it exists
            gone = update(placements).where(mine).values(phase="destroyed", tombstone=True, updated_at_ms=now_ms)
            connection.execute(gone)
        elif has_volumes(placement):
            counted = update(placements).where(mine).values(generation=placements.c.generation + 1)
            connection.execute(counted)
            lost.append(placement.machine_id)
        else:
            launch = placement.machine_id not in stopped
            _look_for_place(connection, placement, launch=launch, now_ms=now_ms)
    return lost


def _look_for_place(connection: Connection, placement: PlacementRecord, *, launch: bool, now_ms: int) -> None:
    """Also while the copy of an unfinished move is still to be taken away: `begin` would wait for that."""
    generation = placement.generation + 1
    mine = placements.c.machine_id == placement.machine_id
    connection.execute(update(placements).where(mine).values(generation=generation, updated_at_ms=now_ms))
    connection.execute(
        insert(moves).values(
            machine_id=placement.machine_id,
            generation=generation,
            source=placement.node,
            target=None,
            phase="choose",
            launch=launch,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
        )
    )


def has_volumes(placement: PlacementRecord) -> bool:
    return bool(msgspec.json.decode(placement.config).get("mounts"))


def _key(move: MoveRecord) -> ColumnElement[bool]:
    return (moves.c.machine_id == move.machine_id) & (moves.c.generation == move.generation)
