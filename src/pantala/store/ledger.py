"""Statements about what keeps control honest: audit, idempotency keys, the publisher's lease."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from pantala.store.records import AuditRecord, IdempotencyRecord, find, many
from pantala.store.schema import audit, idempotency_keys, orgs, publisher_lease


def write_audit(
    connection: Connection,
    *,
    at_ms: int,
    actor: str,
    org_id: int | None,
    action: str,
    target: str,
    request_id: str,
    origin: str = "",
    outcome: str = "accepted",
    detail: dict[str, Any] | None = None,
) -> int:
    """The entry's id, by which `note_outcome` says later how it ended."""
    made = connection.execute(
        insert(audit)
        .values(
            at_ms=at_ms,
            actor=actor,
            org_id=org_id,
            action=action,
            target=target,
            detail=json.dumps(detail or {}),
            request_id=request_id,
            origin=origin,
            outcome=outcome,
        )
        .returning(audit.c.id)
    )
    return int(made.scalar_one())


def note_outcome(connection: Connection, entry_id: int, outcome: str) -> None:
    connection.execute(update(audit).where(audit.c.id == entry_id).values(outcome=outcome))


def list_audit(
    connection: Connection,
    *,
    org_ids: Sequence[int] | None,
    actor: str,
    app: str,
    since_ms: int,
    before_id: int | None,
    limit: int,
) -> list[AuditRecord]:
    """Newest first. `org_ids` None: all there is; else what was done in these orgs, and by `actor` outside of any."""
    statement = (
        select(
            audit.c.id,
            audit.c.at_ms,
            audit.c.actor,
            orgs.c.slug.label("org"),
            audit.c.action,
            audit.c.target,
            audit.c.detail,
            audit.c.request_id,
            audit.c.origin,
            audit.c.outcome,
        )
        .outerjoin(orgs, orgs.c.id == audit.c.org_id)
        .where(audit.c.at_ms >= since_ms)
        .order_by(audit.c.id.desc())
        .limit(limit)
    )
    if org_ids is not None:
        own = and_(audit.c.org_id.is_(None), audit.c.actor == actor)
        statement = statement.where(or_(audit.c.org_id.in_(org_ids), own))
    if app:
        # Only what belongs to an org is named by an app; a host or a token may have the same name.
        of_app = or_(audit.c.target == app, audit.c.target.startswith(f"{app}/", autoescape=True))
        statement = statement.where(audit.c.org_id.is_not(None), of_app)
    if before_id is not None:
        statement = statement.where(audit.c.id < before_id)
    return many(connection, statement, AuditRecord)


def forget_audit(connection: Connection, *, before_ms: int, most: int) -> int:
    """At most so many of the oldest at once: who else writes does not wait for long."""
    old = select(audit.c.id).where(audit.c.at_ms < before_ms).order_by(audit.c.id).limit(most)
    return connection.execute(delete(audit).where(audit.c.id.in_(old))).rowcount


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
