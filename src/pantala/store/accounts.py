"""Statements about users, orgs, memberships and tokens."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, insert, or_, select, update

from pantala.store.records import MembershipRecord, OrgRecord, TokenRecord, TokenRow, find, many
from pantala.store.schema import apps, memberships, orgs, tokens, users


def insert_user(connection: Connection, *, user_id: str, email: str, now_ms: int) -> None:
    connection.execute(insert(users).values(id=user_id, email=email, created_at_ms=now_ms))


def find_user_id(connection: Connection, email: str) -> str | None:
    return connection.execute(select(users.c.id).where(users.c.email == email)).scalar_one_or_none()


def insert_org(connection: Connection, *, slug: str, name: str, now_ms: int) -> int:
    result = connection.execute(insert(orgs).values(slug=slug, name=name, created_at_ms=now_ms).returning(orgs.c.id))
    return int(result.scalar_one())


def find_org(connection: Connection, slug: str) -> OrgRecord | None:
    return find(connection, select(orgs.c.id, orgs.c.slug, orgs.c.name).where(orgs.c.slug == slug), OrgRecord)


def find_first_org(connection: Connection) -> OrgRecord | None:
    """The one that the platform was set up with."""
    statement = select(orgs.c.id, orgs.c.slug, orgs.c.name).order_by(orgs.c.id).limit(1)
    return find(connection, statement, OrgRecord)


def list_orgs(connection: Connection, org_ids: Sequence[int]) -> list[OrgRecord]:
    statement = select(orgs.c.id, orgs.c.slug, orgs.c.name).where(orgs.c.id.in_(org_ids)).order_by(orgs.c.slug)
    return many(connection, statement, OrgRecord)


def ensure_membership(connection: Connection, *, org_id: int, user_id: str, role: str) -> None:
    mine = (memberships.c.org_id == org_id) & (memberships.c.user_id == user_id)
    if connection.execute(update(memberships).where(mine).values(role=role)).rowcount == 0:
        connection.execute(insert(memberships).values(org_id=org_id, user_id=user_id, role=role))


def list_memberships(connection: Connection, user_ids: Sequence[str]) -> list[MembershipRecord]:
    return many(connection, select(memberships).where(memberships.c.user_id.in_(user_ids)), MembershipRecord)


def insert_token(
    connection: Connection,
    *,
    token_id: str,
    digest: str,
    name: str,
    user_id: str,
    role: str,
    org_id: int | None,
    app_id: int | None,
    now_ms: int,
    expires_at_ms: int,
) -> None:
    connection.execute(
        insert(tokens).values(
            id=token_id,
            digest=digest,
            name=name,
            user_id=user_id,
            role=role,
            org_id=org_id,
            app_id=app_id,
            created_at_ms=now_ms,
            expires_at_ms=expires_at_ms,
        )
    )


def list_tokens(connection: Connection, digests: Sequence[str], *, now_ms: int) -> list[TokenRecord]:
    """Tokens with these digests that are neither revoked nor expired."""
    statement = (
        select(
            tokens.c.id,
            tokens.c.name,
            tokens.c.user_id,
            users.c.email,
            tokens.c.role,
            tokens.c.org_id,
            tokens.c.app_id,
            tokens.c.expires_at_ms,
        )
        .join(users, users.c.id == tokens.c.user_id)
        .where(tokens.c.digest.in_(digests))
        .where(tokens.c.revoked_at_ms.is_(None))
        .where(tokens.c.expires_at_ms > now_ms)
    )
    return many(connection, statement, TokenRecord)


def list_revocable(
    connection: Connection, *, user_id: str | None, org_ids: Sequence[int], now_ms: int, token_id: str | None = None
) -> list[TokenRow]:
    """Valid tokens of this user, and those for these orgs and their apps, newest first."""
    statement = (
        select(
            tokens.c.id,
            tokens.c.name,
            users.c.email,
            tokens.c.role,
            tokens.c.org_id,
            orgs.c.slug.label("org_slug"),
            apps.c.name.label("app"),
            tokens.c.created_at_ms,
            tokens.c.expires_at_ms,
        )
        .join(users, users.c.id == tokens.c.user_id)
        .outerjoin(orgs, orgs.c.id == tokens.c.org_id)
        .outerjoin(apps, apps.c.id == tokens.c.app_id)
        .where(or_(tokens.c.user_id == user_id, tokens.c.org_id.in_(org_ids)))
        .where(tokens.c.revoked_at_ms.is_(None))
        .where(tokens.c.expires_at_ms > now_ms)
        .order_by(tokens.c.created_at_ms.desc(), tokens.c.id.desc())
    )
    if token_id is not None:
        statement = statement.where(tokens.c.id == token_id)
    return many(connection, statement, TokenRow)


def revoke_token(connection: Connection, token_id: str, *, now_ms: int) -> None:
    connection.execute(
        update(tokens).where(tokens.c.id == token_id, tokens.c.revoked_at_ms.is_(None)).values(revoked_at_ms=now_ms)
    )
