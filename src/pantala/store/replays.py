"""Statements about whose replays reach an org's apps."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from pantala.store.records import ReplayRulesRecord
from pantala.store.schema import orgs, replay_sources


def get_rules(connection: Connection, org_id: int) -> ReplayRulesRecord:
    statement = select(orgs.c.slug, orgs.c.cross_network_replays).where(orgs.c.id == org_id)
    slug, cross_network = connection.execute(statement).one()
    return ReplayRulesRecord(org=slug, cross_network=cross_network, sources=_sources(connection, org_id))


def list_rules(connection: Connection) -> list[ReplayRulesRecord]:
    """Of the orgs that allow more than the default."""
    listed = select(replay_sources.c.org_id)
    statement = select(orgs.c.id).where(orgs.c.cross_network_replays | orgs.c.id.in_(listed)).order_by(orgs.c.slug)
    return [get_rules(connection, org_id) for org_id in connection.execute(statement).scalars()]


def _sources(connection: Connection, org_id: int) -> list[str]:
    source = orgs.alias("source")
    statement = (
        select(source.c.slug)
        .join(replay_sources, replay_sources.c.source_org_id == source.c.id)
        .where(replay_sources.c.org_id == org_id)
        .order_by(source.c.slug)
    )
    return list(connection.execute(statement).scalars())


def set_cross_network(connection: Connection, org_id: int, *, allowed: bool) -> None:
    connection.execute(update(orgs).where(orgs.c.id == org_id).values(cross_network_replays=allowed))


def ensure_source(connection: Connection, org_id: int, source_org_id: int) -> None:
    mine = (replay_sources.c.org_id == org_id) & (replay_sources.c.source_org_id == source_org_id)
    if connection.execute(select(replay_sources.c.org_id).where(mine)).first() is None:
        connection.execute(insert(replay_sources).values(org_id=org_id, source_org_id=source_org_id))


def delete_source(connection: Connection, org_id: int, slug: str) -> bool:
    source = select(orgs.c.id).where(orgs.c.slug == slug).scalar_subquery()
    mine = (replay_sources.c.org_id == org_id) & (replay_sources.c.source_org_id == source)
    return connection.execute(delete(replay_sources).where(mine)).rowcount > 0
