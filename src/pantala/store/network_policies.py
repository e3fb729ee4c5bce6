"""Statements about network policies. What they mean is `domain/policies.py`."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from pantala.store.records import NetworkPolicyRecord, find, many
from pantala.store.schema import apps, network_policies

_POLICY = select(network_policies, apps.c.name.label("app")).join(apps, apps.c.id == network_policies.c.app_id)


def list_policies(connection: Connection, *, app_id: int | None = None) -> list[NetworkPolicyRecord]:
    """The oldest first."""
    statement = _POLICY.order_by(network_policies.c.created_at_ms, network_policies.c.id)
    return many(
        connection,
        statement if app_id is None else statement.where(network_policies.c.app_id == app_id),
        NetworkPolicyRecord,
    )


def find_policy(connection: Connection, app_id: int, policy_id: str) -> NetworkPolicyRecord | None:
    mine = (network_policies.c.app_id == app_id) & (network_policies.c.id == policy_id)
    return find(connection, _POLICY.where(mine), NetworkPolicyRecord)


def put_policy(
    connection: Connection, policy_id: str, *, app_id: int, name: str, document: str, now_ms: int
) -> NetworkPolicyRecord:
    """Make it or change it. The caller has seen that no other policy of the app has the name."""
    mine = (network_policies.c.id == policy_id) & (network_policies.c.app_id == app_id)
    values = {"name": name, "document": document, "updated_at_ms": now_ms}
    if connection.execute(update(network_policies).where(mine).values(**values)).rowcount == 0:
        connection.execute(insert(network_policies).values(id=policy_id, app_id=app_id, created_at_ms=now_ms, **values))
    found = find_policy(connection, app_id, policy_id)
    assert found is not None
    return found


def delete_policy(connection: Connection, app_id: int, policy_id: str) -> bool:
    mine = (network_policies.c.id == policy_id) & (network_policies.c.app_id == app_id)
    return connection.execute(delete(network_policies).where(mine)).rowcount == 1


def delete_all(connection: Connection, app_id: int) -> list[str]:
    """Of an app that goes; the ids of those that it had."""
    statement = delete(network_policies).where(network_policies.c.app_id == app_id).returning(network_policies.c.id)
    return [str(policy_id) for policy_id in connection.execute(statement).scalars()]
