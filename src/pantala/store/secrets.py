"""Statements about an app's sealed secrets, which nodes have been given which version, and its secret keys."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import Connection, delete, insert, select, update

from pantala.store.records import SecretKeyRecord, SecretRecord, find, many
from pantala.store.schema import apps, nodes, placements, secret_deliveries, secret_keys, secrets


def put_secrets(
    connection: Connection, app_id: int, values: Mapping[str, tuple[str, str] | None], *, now_ms: int
) -> int:
    """Set (sealed, digest) or remove (None) by name, in one step; the app's new secrets version."""
    for name, value in values.items():
        mine = (secrets.c.app_id == app_id) & (secrets.c.name == name)
        if value is None:
            connection.execute(delete(secrets).where(mine))
            continue
        sealed, digest = value
        changed = update(secrets).where(mine).values(sealed=sealed, digest=digest, updated_at_ms=now_ms)
        if connection.execute(changed).rowcount == 0:
            connection.execute(
                insert(secrets).values(
                    app_id=app_id, name=name, sealed=sealed, digest=digest, created_at_ms=now_ms, updated_at_ms=now_ms
                )
            )
    return bump_version(connection, app_id)


def bump_version(connection: Connection, app_id: int) -> int:
    """Of everything secret in an app, its secret keys too."""
    bump = update(apps).where(apps.c.id == app_id).values(secrets_version=apps.c.secrets_version + 1)
    return int(connection.execute(bump.returning(apps.c.secrets_version)).scalar_one())


def put_key(connection: Connection, app_id: int, record: SecretKeyRecord) -> None:
    """Made, or replaced by what has the same name; `created_at_ms` stays that of the first."""
    mine = (secret_keys.c.app_id == app_id) & (secret_keys.c.name == record.name)
    values = msgspec.structs.asdict(record)
    changed = {key: value for key, value in values.items() if key not in ("name", "created_at_ms")}
    if connection.execute(update(secret_keys).where(mine).values(**changed)).rowcount == 0:
        connection.execute(insert(secret_keys).values(app_id=app_id, **values))


def find_key(connection: Connection, app_id: int, name: str) -> SecretKeyRecord | None:
    statement = _KEY.where(secret_keys.c.app_id == app_id, secret_keys.c.name == name)
    return find(connection, statement, SecretKeyRecord)


def list_keys(connection: Connection, app_id: int) -> list[SecretKeyRecord]:
    statement = _KEY.where(secret_keys.c.app_id == app_id).order_by(secret_keys.c.name)
    return many(connection, statement, SecretKeyRecord)


def delete_key(connection: Connection, app_id: int, name: str) -> bool:
    mine = (secret_keys.c.app_id == app_id) & (secret_keys.c.name == name)
    return connection.execute(delete(secret_keys).where(mine)).rowcount == 1


_KEY = select(
    secret_keys.c.name,
    secret_keys.c.type,
    secret_keys.c.sealed,
    secret_keys.c.public_key,
    secret_keys.c.created_at_ms,
    secret_keys.c.updated_at_ms,
)


def list_secrets(connection: Connection, app_id: int) -> list[SecretRecord]:
    statement = select(
        secrets.c.name, secrets.c.sealed, secrets.c.digest, secrets.c.created_at_ms, secrets.c.updated_at_ms
    )
    return many(connection, statement.where(secrets.c.app_id == app_id).order_by(secrets.c.name), SecretRecord)


def record_delivery(connection: Connection, *, app_id: int, node: str, version: int) -> None:
    """Never goes back: an older delivery that ends late changes nothing."""
    mine = (secret_deliveries.c.app_id == app_id) & (secret_deliveries.c.node == node)
    known = connection.execute(select(secret_deliveries.c.version).where(mine)).scalar_one_or_none()
    if known is None:
        connection.execute(insert(secret_deliveries).values(app_id=app_id, node=node, version=version))
    elif int(known) < version:
        connection.execute(update(secret_deliveries).where(mine).values(version=version))


def list_undelivered(connection: Connection) -> list[tuple[int, str]]:
    """(app id, node) where a live machine's node has older secrets than the app."""
    statement = (
        select(placements.c.app_id, placements.c.node)
        .distinct()
        .join(apps, apps.c.id == placements.c.app_id)
        .join(nodes, nodes.c.id == placements.c.node)
        .outerjoin(
            secret_deliveries,
            (secret_deliveries.c.app_id == placements.c.app_id) & (secret_deliveries.c.node == placements.c.node),
        )
        .where(
            placements.c.tombstone.is_(False),
            placements.c.phase == "placed",
            nodes.c.status.in_(("active", "draining")),
        )
        .where(apps.c.deleted_at_ms.is_(None), apps.c.secrets_version > 0)
        .where((secret_deliveries.c.version.is_(None)) | (secret_deliveries.c.version < apps.c.secrets_version))
    )
    return [(int(app_id), str(node)) for app_id, node in connection.execute(statement)]
