"""Statements about certificates, the orders for them, and session-ticket keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, select, update

from pantala.store.records import (
    AcmeAccountRecord,
    AnswerRecord,
    CertificateRecord,
    OrderRecord,
    TicketKeyRecord,
    find,
    many,
)
from pantala.store.schema import acme_accounts, acme_answers, acme_orders, certificates, ticket_keys

NAMED_AT_ONCE = 500
"""Databases bound how much one statement may name."""


def put_certificate(connection: Connection, record: CertificateRecord) -> None:
    values = {name: getattr(record, name) for name in CertificateRecord.__struct_fields__ if name != "name"}
    mine = certificates.c.name == record.name
    if connection.execute(update(certificates).where(mine).values(**values)).rowcount == 0:
        connection.execute(insert(certificates).values(name=record.name, **values))


def list_certificates(
    connection: Connection, *, hostname: str | None = None, source: str | None = None
) -> list[CertificateRecord]:
    statement = select(certificates).order_by(certificates.c.name)
    if hostname is not None:
        statement = statement.where(certificates.c.hostname == hostname)
    if source is not None:
        statement = statement.where(certificates.c.source == source)
    return many(connection, statement, CertificateRecord)


def list_marks(connection: Connection) -> dict[str, str]:
    """By name what changes whenever a certificate is put or sealed anew, without the certificate itself: sealing never
    gives the same text twice."""
    columns = select(certificates.c.name, certificates.c.sealed_key.concat(certificates.c.sealed_to))
    return {str(row[0]): str(row[1]) for row in connection.execute(columns)}


def list_named(connection: Connection, names: Sequence[str]) -> list[CertificateRecord]:
    found: list[CertificateRecord] = []
    for start in range(0, len(names), NAMED_AT_ONCE):
        some = certificates.c.name.in_(names[start : start + NAMED_AT_ONCE])
        found += many(connection, select(certificates).where(some), CertificateRecord)
    return found


def delete_certificate(connection: Connection, name: str) -> bool:
    return connection.execute(delete(certificates).where(certificates.c.name == name)).rowcount == 1


def list_sealed_otherwise(connection: Connection, edge_key: str, *, limit: int) -> list[CertificateRecord]:
    """Kept certificates whose key is sealed to another edge key than this."""
    other = (certificates.c.sealed_to != edge_key) & (certificates.c.kept_key != "")
    return many(connection, select(certificates).where(other).limit(limit), CertificateRecord)


def reseal(connection: Connection, record: CertificateRecord, *, sealed_key: str, sealed_to: str) -> bool:
    """Guarded: only as long as it is the certificate that the caller read."""
    same = (certificates.c.name == record.name) & (certificates.c.kept_key == record.kept_key)
    values = {"sealed_key": sealed_key, "sealed_to": sealed_to}
    return connection.execute(update(certificates).where(same).values(**values)).rowcount == 1


# -- orders ----------------------------------------------------------------------------------------------------------


def find_order(connection: Connection, hostname: str) -> OrderRecord | None:
    return find(connection, select(acme_orders).where(acme_orders.c.hostname == hostname), OrderRecord)


def count_orders(connection: Connection, *, since_ms: int) -> int:
    statement = select(func.count()).select_from(acme_orders).where(acme_orders.c.created_at_ms >= since_ms)
    return int(connection.execute(statement).scalar_one())


def insert_order(connection: Connection, order: OrderRecord) -> None:
    """The key of the table is the name: a second order for it is refused."""
    connection.execute(
        insert(acme_orders).values(**{name: getattr(order, name) for name in OrderRecord.__struct_fields__})
    )


def set_order_url(connection: Connection, hostname: str, url: str) -> None:
    connection.execute(update(acme_orders).where(acme_orders.c.hostname == hostname).values(url=url))


def put_answer(connection: Connection, answer: AnswerRecord) -> None:
    same = (
        (acme_answers.c.kind == answer.kind)
        & (acme_answers.c.name == answer.name)
        & (acme_answers.c.value == answer.value)
    )
    if connection.execute(update(acme_answers).where(same).values(hostname=answer.hostname)).rowcount == 0:
        values = {name: getattr(answer, name) for name in AnswerRecord.__struct_fields__}
        connection.execute(insert(acme_answers).values(**values))


def list_answers(connection: Connection, *, hostname: str | None = None) -> list[AnswerRecord]:
    statement = select(acme_answers).order_by(acme_answers.c.kind, acme_answers.c.name, acme_answers.c.value)
    if hostname is not None:
        statement = statement.where(acme_answers.c.hostname == hostname)
    return many(connection, statement, AnswerRecord)


def end_order(connection: Connection, hostname: str) -> list[AnswerRecord]:
    """The order with everything that was put up for it; the answers that must go."""
    answers = list_answers(connection, hostname=hostname)
    connection.execute(delete(acme_answers).where(acme_answers.c.hostname == hostname))
    challenge = (certificates.c.hostname == hostname) & (certificates.c.source == "challenge")
    connection.execute(delete(certificates).where(challenge))
    connection.execute(delete(acme_orders).where(acme_orders.c.hostname == hostname))
    return answers


# -- accounts --------------------------------------------------------------------------------------------------------


def find_account(connection: Connection, directory: str) -> AcmeAccountRecord | None:
    return find(connection, select(acme_accounts).where(acme_accounts.c.directory == directory), AcmeAccountRecord)


def ensure_account(connection: Connection, record: AcmeAccountRecord) -> AcmeAccountRecord:
    """The one that is kept: an earlier one stays."""
    kept = find_account(connection, record.directory)
    if kept is None:
        values = {name: getattr(record, name) for name in AcmeAccountRecord.__struct_fields__}
        connection.execute(insert(acme_accounts).values(**values))
    return kept or record


def set_account_url(connection: Connection, directory: str, url: str) -> None:
    connection.execute(update(acme_accounts).where(acme_accounts.c.directory == directory).values(url=url))


# -- ticket keys -----------------------------------------------------------------------------------------------------


def list_ticket_keys(connection: Connection) -> list[TicketKeyRecord]:
    return many(connection, select(ticket_keys).order_by(ticket_keys.c.id), TicketKeyRecord)


def insert_ticket_key(
    connection: Connection, *, kept_key: str, sealed_key: str, sealed_to: str, not_before_ms: int, not_after_ms: int
) -> None:
    connection.execute(
        insert(ticket_keys).values(
            kept_key=kept_key,
            sealed_key=sealed_key,
            sealed_to=sealed_to,
            not_before_ms=not_before_ms,
            not_after_ms=not_after_ms,
        )
    )


def reseal_ticket_key(connection: Connection, key_id: int, *, sealed_key: str, sealed_to: str) -> None:
    values = {"sealed_key": sealed_key, "sealed_to": sealed_to}
    connection.execute(update(ticket_keys).where(ticket_keys.c.id == key_id).values(**values))


def forget_ticket_keys(connection: Connection, *, before_ms: int) -> int:
    return connection.execute(delete(ticket_keys).where(ticket_keys.c.not_after_ms < before_ms)).rowcount
