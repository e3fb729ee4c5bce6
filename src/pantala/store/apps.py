"""Statements about apps, their networks, host names and releases."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from pantala.errors import NameTaken
from pantala.store.records import AppRecord, ReleaseRecord, find, many
from pantala.store.schema import apps, networks, orgs, placements, releases, secret_keys, secrets

NAME_TAKEN = "Name has already been taken"


def ensure_network(connection: Connection, *, org_id: int, name: str) -> int:
    """The org's network of that name; its id is allocated at first use and stays for good."""
    found = find_network(connection, org_id=org_id, name=name)
    if found is not None:
        return found
    made = connection.execute(insert(networks).values(org_id=org_id, name=name).returning(networks.c.id))
    return int(made.scalar_one())


def find_network(connection: Connection, *, org_id: int, name: str) -> int | None:
    mine = (networks.c.org_id == org_id) & (networks.c.name == name)
    found = connection.execute(select(networks.c.id).where(mine)).scalar_one_or_none()
    return None if found is None else int(found)


def insert_app(connection: Connection, *, name: str, org_id: int, network_id: int, role: str, now_ms: int) -> None:
    try:
        connection.execute(
            insert(apps).values(
                name=name,
                org_id=org_id,
                network_id=network_id,
                role=role,
                status="pending",
                secrets_version=_last_secrets_version(connection, name),
                created_at_ms=now_ms,
            )
        )
    except IntegrityError as error:
        raise NameTaken(NAME_TAKEN, hint=f"choose another name than {name}") from error


def _last_secrets_version(connection: Connection, name: str) -> int:
    """Nodes know secrets by app name and keep the highest version, so a reused name goes on counting."""
    newest = connection.execute(select(func.max(apps.c.secrets_version)).where(apps.c.name == name)).scalar_one()
    return int(newest or 0)


_APP = (
    select(
        apps.c.id,
        apps.c.name,
        apps.c.org_id,
        orgs.c.slug.label("org_slug"),
        orgs.c.name.label("org_name"),
        apps.c.network_id,
        networks.c.name.label("network"),
        apps.c.role,
        apps.c.status,
        apps.c.secrets_version,
        apps.c.created_at_ms,
    )
    .join(orgs, orgs.c.id == apps.c.org_id)
    .join(networks, networks.c.id == apps.c.network_id)
)


def find_app(connection: Connection, name: str) -> AppRecord | None:
    return find(connection, _APP.where(apps.c.name == name, apps.c.deleted_at_ms.is_(None)), AppRecord)


def get_app_by_id(connection: Connection, app_id: int) -> AppRecord:
    """Also of a deleted app: its machines may still be on their way out."""
    found = find(connection, _APP.where(apps.c.id == app_id), AppRecord)
    assert found is not None
    return found


def list_apps(connection: Connection, *, org_id: int | None = None) -> list[AppRecord]:
    statement = _APP.where(apps.c.deleted_at_ms.is_(None)).order_by(apps.c.name)
    return many(connection, statement if org_id is None else statement.where(apps.c.org_id == org_id), AppRecord)


def count_machines(connection: Connection) -> dict[int, int]:
    """Machines by app id; apps without any are missing."""
    statement = (
        select(placements.c.app_id, func.count()).where(placements.c.tombstone.is_(False)).group_by(placements.c.app_id)
    )
    return {int(app_id): int(count) for app_id, count in connection.execute(statement)}


def set_status(connection: Connection, app_id: int, status: str) -> None:
    connection.execute(update(apps).where(apps.c.id == app_id).values(status=status))


def delete_app(connection: Connection, app_id: int, *, now_ms: int) -> bool:
    """Frees the name, forgets its secrets. Machines, host names and addresses are the caller's."""
    live = (apps.c.id == app_id) & apps.c.deleted_at_ms.is_(None)
    if connection.execute(update(apps).where(live).values(deleted_at_ms=now_ms)).rowcount == 0:
        return False
    connection.execute(delete(secrets).where(secrets.c.app_id == app_id))
    connection.execute(delete(secret_keys).where(secret_keys.c.app_id == app_id))
    return True


# -- releases ----------------------------------------------------------------------------------------------------


def insert_release(connection: Connection, *, app_id: int, **values: Any) -> ReleaseRecord:
    newest = connection.execute(select(func.max(releases.c.version)).where(releases.c.app_id == app_id)).scalar_one()
    connection.execute(insert(releases).values(app_id=app_id, version=int(newest or 0) + 1, **values))
    found = find_release(connection, app_id, values["id"])
    assert found is not None
    return found


def find_release(connection: Connection, app_id: int, release_id: str) -> ReleaseRecord | None:
    statement = select(releases).where(releases.c.app_id == app_id, releases.c.id == release_id)
    return find(connection, statement, ReleaseRecord)


def list_releases(connection: Connection, app_id: int, *, limit: int) -> list[ReleaseRecord]:
    statement = select(releases).where(releases.c.app_id == app_id).order_by(releases.c.version.desc()).limit(limit)
    return many(connection, statement, ReleaseRecord)


def update_release(connection: Connection, release: ReleaseRecord, **values: Any) -> bool:
    """Guarded by the status that the caller judged."""
    same = (releases.c.id == release.id) & (releases.c.status == release.status)
    return connection.execute(update(releases).where(same).values(**values)).rowcount == 1


def delete_release(connection: Connection, release: ReleaseRecord) -> bool:
    """Only the app's newest, in the status and at the step that the caller judged; its version is free again."""
    newest = select(func.max(releases.c.version)).where(releases.c.app_id == release.app_id).scalar_subquery()
    same = (releases.c.id == release.id) & (releases.c.status == release.status)
    unmoved = (releases.c.cursor == release.cursor) & (releases.c.version == newest)
    return connection.execute(delete(releases).where(same & unmoved)).rowcount == 1
