"""Statements about what keeps control honest: audit, idempotency keys, the publisher's lease."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from pantala.store.records import IdempotencyRecord, find
from pantala.store.schema import audit, idempotency_keys, publisher_lease


def write_audit(
    connection: Connection,
    *,
    at_ms: int,
    actor: str,
    org_id: int | None,
    action: str,
    target: str,
    request_id: str,
    detail: dict[str, Any] | None = None,
) -> None:
    connection.execute(
        insert(audit).values(
            at_ms=at_ms,
            actor=actor,
            org_id=org_id,
            action=action,
            target=target,
            detail=json.dumps(detail or {}),
            request_id=request_id,
        )
    )


# -- idempotency -------------------------------------------------------------------------------------------------


def find_answer(connection: Connection, *, scope: str, key: str) -> IdempotencyRecord | None:
    mine = (idempotency_keys.c.scope == scope) & (idempotency_keys.c.key == key)
    statement = select(
        idempotency_keys.c.digest,
        idempotency_keys.c.boot,
        idempotency_keys.c.code,
        idempotency_keys.c.sealed_answer,
    )
    return find(connection, statement.where(mine), IdempotencyRecord)


def claim_key(connection: Connection, *, scope: str, key: str, digest: str, boot: str, now_ms: int) -> None:
    """A new key, or one whose process died before it answered."""
    forget_key(connection, scope=scope, key=key)
    connection.execute(
        insert(idempotency_keys).values(scope=scope, key=key, digest=digest, boot=boot, created_at_ms=now_ms)
    )


def keep_key(connection: Connection, *, scope: str, key: str, code: int, sealed_answer: str) -> None:
    mine = (idempotency_keys.c.scope == scope) & (idempotency_keys.c.key == key)
    connection.execute(update(idempotency_keys).where(mine).values(code=code, sealed_answer=sealed_answer))


def forget_key(connection: Connection, *, scope: str, key: str) -> None:
    mine = (idempotency_keys.c.scope == scope) & (idempotency_keys.c.key == key)
    connection.execute(delete(idempotency_keys).where(mine))


def forget_old_keys(connection: Connection, *, before_ms: int) -> int:
    return connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at_ms < before_ms)).rowcount


# -- the publisher's lease ---------------------------------------------------------------------------------------


def acquire_lease(connection: Connection, *, name: str, holder: str, ttl_ms: int, now_ms: int) -> int | None:
    """A new epoch if the lease is free, lapsed or the holder's own of an earlier life; None while another has it."""
    row = connection.execute(select(publisher_lease).where(publisher_lease.c.name == name)).mappings().one_or_none()
    values = {"holder": holder, "expires_at_ms": now_ms + ttl_ms}
    if row is None:
        connection.execute(insert(publisher_lease).values(name=name, epoch=1, **values))
        return 1
    if row["holder"] != holder and int(row["expires_at_ms"]) > now_ms:
        return None
    epoch = int(row["epoch"]) + 1
    connection.execute(update(publisher_lease).where(publisher_lease.c.name == name).values(epoch=epoch, **values))
    return epoch


def renew_lease(connection: Connection, *, name: str, holder: str, epoch: int, ttl_ms: int, now_ms: int) -> bool:
    mine = (publisher_lease.c.name == name) & (publisher_lease.c.holder == holder) & (publisher_lease.c.epoch == epoch)
    return connection.execute(update(publisher_lease).where(mine).values(expires_at_ms=now_ms + ttl_ms)).rowcount == 1
