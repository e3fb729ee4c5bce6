"""Statements about addresses that apps were given. Which one is free is decided by `planner/addresses.py`."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, literal, null, select, update

from pantala.store.records import AddressRecord, find, many
from pantala.store.schema import addresses, apps, shared_addresses

_OWN = select(
    addresses.c.address,
    addresses.c.kind,
    addresses.c.app_id,
    apps.c.name.label("app"),
    addresses.c.network_id,
    addresses.c.created_at_ms,
    addresses.c.released_at_ms,
).join(apps, apps.c.id == addresses.c.app_id)
_SHARED = select(
    shared_addresses.c.address,
    literal("shared_v4").label("kind"),
    shared_addresses.c.app_id,
    apps.c.name.label("app"),
    null().label("network_id"),
    shared_addresses.c.created_at_ms,
    null().label("released_at_ms"),
).join(apps, apps.c.id == shared_addresses.c.app_id)


def list_addresses(connection: Connection, *, app_id: int | None = None) -> list[AddressRecord]:
    """Those in use, the oldest first."""
    own, shared = _OWN, _SHARED
    if app_id is not None:
        own, shared = own.where(addresses.c.app_id == app_id), shared.where(shared_addresses.c.app_id == app_id)
    found = many(connection, own, AddressRecord) + many(connection, shared, AddressRecord)
    return sorted(found, key=lambda record: (record.created_at_ms, record.kind, record.address))


def find_address(connection: Connection, address: str) -> AddressRecord | None:
    """One that belongs to a single app."""
    return find(connection, _OWN.where(addresses.c.address == address), AddressRecord)


def list_taken(connection: Connection, kind: str, *, released_after_ms: int) -> dict[str, bool]:
    """Addresses that cannot be given out: in use (true), or released since then (false)."""
    columns = select(addresses.c.address, addresses.c.app_id, addresses.c.created_at_ms, addresses.c.released_at_ms)
    taken: dict[str, bool] = {}
    for address, app_id, created_at_ms, released_at_ms in connection.execute(columns.where(addresses.c.kind == kind)):
        if app_id is not None:
            taken[str(address)] = True
        elif int(released_at_ms if released_at_ms is not None else created_at_ms) > released_after_ms:
            taken[str(address)] = False
    return taken


def take_address(
    connection: Connection, address: str, *, kind: str, app_id: int, network_id: int | None, now_ms: int
) -> None:
    values = {
        "kind": kind,
        "app_id": app_id,
        "network_id": network_id,
        "created_at_ms": now_ms,
        "released_at_ms": None,
    }
    again = (addresses.c.address == address) & addresses.c.app_id.is_(None)
    if connection.execute(update(addresses).where(again).values(**values)).rowcount == 0:
        connection.execute(insert(addresses).values(address=address, **values))


def release_address(connection: Connection, address: str, *, app_id: int, now_ms: int) -> bool:
    mine = (addresses.c.address == address) & (addresses.c.app_id == app_id)
    values = {"app_id": None, "network_id": None, "released_at_ms": now_ms}
    return connection.execute(update(addresses).where(mine).values(**values)).rowcount == 1


def release_all(connection: Connection, app_id: int, *, now_ms: int) -> list[str]:
    """Of an app that goes; the addresses that were its own."""
    own = [str(row[0]) for row in connection.execute(select(addresses.c.address).where(addresses.c.app_id == app_id))]
    for address in own:
        release_address(connection, address, app_id=app_id, now_ms=now_ms)
    release_shared(connection, app_id)
    return own


def take_shared(connection: Connection, address: str, *, app_id: int, now_ms: int) -> None:
    connection.execute(insert(shared_addresses).values(app_id=app_id, address=address, created_at_ms=now_ms))


def release_shared(connection: Connection, app_id: int) -> bool:
    return connection.execute(delete(shared_addresses).where(shared_addresses.c.app_id == app_id)).rowcount == 1
