"""Statements about placements: which node holds a machine."""

from __future__ import annotations

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from pantala.errors import NameTaken
from pantala.store.records import PlacementRecord, find, many
from pantala.store.schema import UNFINISHED, apps, placements


def insert_placement(
    connection: Connection,
    *,
    machine_id: str,
    app_id: int,
    name: str,
    node: str,
    region: str,
    boot: str,
    config: str,
    now_ms: int,
) -> None:
    """Written before the node is asked. Raises NameTaken for a name that a live machine of the app has."""
    try:
        connection.execute(
            insert(placements).values(
                machine_id=machine_id,
                app_id=app_id,
                name=name,
                node=node,
                region=region,
                generation=1,
                phase="placing",
                tombstone=False,
                boot=boot,
                config=config,
                snapshot="",
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
        )
    except IntegrityError as error:
        raise NameTaken(f"name: a machine of this app is called {name} already") from error


def find_placement(connection: Connection, app_id: int, machine_id: str) -> PlacementRecord | None:
    """Also of a destroyed machine, as long as its creation was ever answered."""
    mine = (placements.c.machine_id == machine_id) & (placements.c.app_id == app_id)
    return find(connection, select(placements).where(mine, placements.c.snapshot != ""), PlacementRecord)


def find_placement_by_name(connection: Connection, app_id: int, name: str) -> PlacementRecord | None:
    mine = (placements.c.app_id == app_id) & (placements.c.name == name) & placements.c.tombstone.is_(False)
    return find(connection, select(placements).where(mine), PlacementRecord)


def list_placements(connection: Connection, app_id: int, *, include_deleted: bool = False) -> list[PlacementRecord]:
    statement = select(placements).where(placements.c.app_id == app_id, placements.c.snapshot != "")
    if not include_deleted:
        statement = statement.where(placements.c.tombstone.is_(False))
    return many(connection, statement.order_by(placements.c.created_at_ms, placements.c.machine_id), PlacementRecord)


def list_unfinished(connection: Connection, *, boot: str) -> list[PlacementRecord]:
    """What a sweep must finish: machines being destroyed, and creations that no request of this process waits for."""
    abandoned = (placements.c.phase == "placing") & (placements.c.boot != boot)
    statement = select(placements).where(UNFINISHED, (placements.c.phase == "destroying") | abandoned)
    return many(connection, statement.order_by(placements.c.updated_at_ms).limit(1000), PlacementRecord)


def count_by_node(connection: Connection, app_id: int) -> dict[str, int]:
    statement = (
        select(placements.c.node, func.count())
        .where(placements.c.app_id == app_id, placements.c.tombstone.is_(False))
        .group_by(placements.c.node)
    )
    return {str(node): int(count) for node, count in connection.execute(statement)}


def orgs_by_node(connection: Connection) -> dict[str, set[int]]:
    """Which orgs have machines on a node."""
    statement = (
        select(placements.c.node, apps.c.org_id)
        .distinct()
        .join(apps, apps.c.id == placements.c.app_id)
        .where(placements.c.tombstone.is_(False))
    )
    found: dict[str, set[int]] = {}
    for node, org_id in connection.execute(statement):
        found.setdefault(str(node), set()).add(int(org_id))
    return found


def keep_answer(
    connection: Connection, machine_id: str, *, snapshot: str, config: str | None = None, now_ms: int
) -> None:
    """The machine as its node answered it; `config` when the request changed it."""
    values = {"snapshot": snapshot, "updated_at_ms": now_ms} | ({} if config is None else {"config": config})
    connection.execute(update(placements).where(placements.c.machine_id == machine_id).values(**values))


def move_phase(connection: Connection, machine_id: str, *, before: tuple[str, ...], after: str, now_ms: int) -> bool:
    """Guarded step: false when the placement is in none of the phases of `before`."""
    here = (placements.c.machine_id == machine_id) & placements.c.phase.in_(before)
    tombstone = after in ("destroying", "destroyed")
    moved = update(placements).where(here).values(phase=after, tombstone=tombstone, updated_at_ms=now_ms)
    return connection.execute(moved).rowcount == 1


def destroy_all_of_app(connection: Connection, app_id: int, *, now_ms: int) -> int:
    live = (placements.c.app_id == app_id) & placements.c.phase.in_(("placing", "placed"))
    gone = update(placements).where(live).values(phase="destroying", tombstone=True, updated_at_ms=now_ms)
    return connection.execute(gone).rowcount


def machines_by_node(connection: Connection) -> dict[str, int]:
    """How many live machines are placed on each node."""
    statement = (
        select(placements.c.node, func.count()).where(placements.c.tombstone.is_(False)).group_by(placements.c.node)
    )
    return {str(node): int(count) for node, count in connection.execute(statement)}
