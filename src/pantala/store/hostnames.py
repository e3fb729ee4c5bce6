"""Statements about the host names that users brought."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from pantala.store.records import HostnameRecord, find, many
from pantala.store.schema import acme_answers, acme_orders, apps, certificates, hostnames

_OWN = tuple(name for name in HostnameRecord.__struct_fields__ if name not in ("app", "org_id"))
_HOSTNAME = select(*(hostnames.c[name] for name in _OWN), apps.c.name.label("app"), apps.c.org_id).join(
    apps, apps.c.id == hostnames.c.app_id
)


def find_hostname(connection: Connection, hostname: str) -> HostnameRecord | None:
    return find(connection, _HOSTNAME.where(hostnames.c.hostname == hostname), HostnameRecord)


def list_hostnames(connection: Connection, *, app_id: int | None = None) -> list[HostnameRecord]:
    statement = _HOSTNAME.order_by(hostnames.c.hostname)
    return many(
        connection, statement if app_id is None else statement.where(hostnames.c.app_id == app_id), HostnameRecord
    )


def page_hostnames(
    connection: Connection, app_id: int, *, containing: str, after: str, limit: int
) -> tuple[list[HostnameRecord], int]:
    """In the order of names, those after `after`; and how many there are in all."""
    mine = (hostnames.c.app_id == app_id) & hostnames.c.hostname.contains(containing, autoescape=True)
    total = connection.execute(select(func.count()).select_from(hostnames).where(mine)).scalar_one()
    page = _HOSTNAME.where(mine & (hostnames.c.hostname > after)).order_by(hostnames.c.hostname).limit(limit)
    return many(connection, page, HostnameRecord), int(total)


def list_under(connection: Connection, parent: str) -> list[HostnameRecord]:
    """Names one label below `parent`."""
    below = _HOSTNAME.where(hostnames.c.hostname.endswith(f".{parent}", autoescape=True))
    return [found for found in many(connection, below, HostnameRecord) if found.hostname.partition(".")[2] == parent]


def list_due(connection: Connection, *, now_ms: int, limit: int) -> list[HostnameRecord]:
    due = (hostnames.c.look_at_ms <= now_ms) & (hostnames.c.look_at_ms > 0)
    return many(connection, _HOSTNAME.where(due).order_by(hostnames.c.look_at_ms).limit(limit), HostnameRecord)


def next_look_ms(connection: Connection) -> int | None:
    found = connection.execute(select(func.min(hostnames.c.look_at_ms)).where(hostnames.c.look_at_ms > 0)).scalar_one()
    return None if found is None else int(found)


def insert_hostname(connection: Connection, hostname: str, *, app_id: int, now_ms: int) -> None:
    connection.execute(
        insert(hostnames).values(hostname=hostname, app_id=app_id, created_at_ms=now_ms, updated_at_ms=now_ms)
    )


def update_hostname(connection: Connection, hostname: str, **values: Any) -> bool:
    """False when it is gone."""
    return connection.execute(update(hostnames).where(hostnames.c.hostname == hostname).values(**values)).rowcount == 1


def delete_hostname(connection: Connection, hostname: str) -> None:
    """With everything that hangs on it."""
    for table in (acme_answers, acme_orders, certificates):
        connection.execute(delete(table).where(table.c.hostname == hostname))
    connection.execute(delete(hostnames).where(hostnames.c.hostname == hostname))
