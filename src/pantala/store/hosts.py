"""Statements about the hosts of the cluster: nodes, the tokens they join with, the edge key."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from pantala.store.records import EdgeKeyRecord, HostTokenRecord, NodeRecord, find, many
from pantala.store.schema import edge_keys, host_tokens, nodes

MEMBERS = ("active", "draining")
_NODE = select(*(nodes.c[name] for name in NodeRecord.__struct_fields__))


def insert_node(connection: Connection, node: NodeRecord) -> None:
    connection.execute(insert(nodes).values(**{name: getattr(node, name) for name in NodeRecord.__struct_fields__}))


def update_node(
    connection: Connection,
    node_id: str,
    *,
    address: str | None = None,
    edge: bool | None = None,
    verify_key: str | None = None,
    bus_key: str | None = None,
    epoch: int | None = None,
    status: str | None = None,
    certificate_until_ms: int | None = None,
) -> None:
    """What is None stays."""
    values = {
        "address": address,
        "edge": edge,
        "verify_key": verify_key,
        "bus_key": bus_key,
        "epoch": epoch,
        "status": status,
        "certificate_until_ms": certificate_until_ms,
    }
    changed = {name: value for name, value in values.items() if value is not None}
    connection.execute(update(nodes).where(nodes.c.id == node_id).values(**changed))


def find_node(connection: Connection, node_id: str) -> NodeRecord | None:
    return find(connection, _NODE.where(nodes.c.id == node_id), NodeRecord)


def list_nodes(connection: Connection) -> list[NodeRecord]:
    """The members of the cluster."""
    return many(connection, _NODE.where(nodes.c.status.in_(MEMBERS)).order_by(nodes.c.id), NodeRecord)


def list_all_nodes(connection: Connection) -> list[NodeRecord]:
    """Also those that are lost or removed."""
    return many(connection, _NODE.order_by(nodes.c.id), NodeRecord)


# -- tokens ----------------------------------------------------------------------------------------------------------


def insert_token(
    connection: Connection, *, token_id: str, digest: str, region: str, made_by: str, now_ms: int, expires_at_ms: int
) -> None:
    connection.execute(
        insert(host_tokens).values(
            id=token_id,
            digest=digest,
            region=region,
            made_by=made_by,
            created_at_ms=now_ms,
            expires_at_ms=expires_at_ms,
        )
    )


def find_token(connection: Connection, digest: str) -> HostTokenRecord | None:
    statement = select(*(host_tokens.c[name] for name in HostTokenRecord.__struct_fields__))
    return find(connection, statement.where(host_tokens.c.digest == digest), HostTokenRecord)


def use_token(connection: Connection, token_id: str, *, node: str, now_ms: int) -> bool:
    """Guarded: false when somebody else has used it."""
    unused = (host_tokens.c.id == token_id) & host_tokens.c.used_at_ms.is_(None)
    return connection.execute(update(host_tokens).where(unused).values(used_at_ms=now_ms, node=node)).rowcount == 1


# -- the edge key ----------------------------------------------------------------------------------------------------


def find_edge_key(connection: Connection) -> EdgeKeyRecord | None:
    """The one in use."""
    statement = select(edge_keys.c.id, edge_keys.c.public_key, edge_keys.c.sealed_key)
    return find(connection, statement.order_by(edge_keys.c.id.desc()).limit(1), EdgeKeyRecord)


def insert_edge_key(connection: Connection, *, public_key: str, sealed_key: str, now_ms: int) -> None:
    connection.execute(insert(edge_keys).values(public_key=public_key, sealed_key=sealed_key, created_at_ms=now_ms))
