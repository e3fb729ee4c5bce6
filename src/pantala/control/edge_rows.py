"""Rows of the catalogue that edges serve users' names and addresses by, made from SQL. Called by `publication.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection

from pantala.kit.rows import Row
from pantala.store import addresses, certificates, hostnames
from pantala.store.records import AddressRecord, AnswerRecord, CertificateRecord, HostnameRecord, TicketKeyRecord
from pantala.wire.feed import AcmeRow, AddressRow, CertRow, HostRow, TextRow, TicketRow

SOURCES = ("acme", "custom", "challenge")
_KINDS: dict[str, Literal["dedicated", "private"]] = {"v4": "dedicated", "v6": "dedicated", "private_v6": "private"}


def certificate_name(source: str, hostname: str) -> str:
    """The key of a certificate, in SQL and in the catalogue."""
    return f"{source}:{hostname}"


class CertificateRows:
    """Rows of all certificates, of which only those that changed since the last look are read: with ten thousand that
    is most of what a publication of everything costs."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, Row]] = {}

    def read(self, connection: Connection, *, owned: set[str]) -> list[Row]:
        """`owned`: names of which public DNS showed that they are the app's; others' own certificates wait."""
        marks = certificates.list_marks(connection)
        known = {name: made for name, made in self._known.items() if marks.get(name) == made[0]}
        changed = [name for name in marks if name not in known]
        for record in certificates.list_named(connection, changed):
            known[record.name] = (marks[record.name], certificate_row(record))
        self._known = known
        waiting = "custom:"
        return [
            row
            for name, (_, row) in known.items()
            if not name.startswith(waiting) or name.removeprefix(waiting) in owned
        ]


def all_rows(connection: Connection, kept: CertificateRows, known: Iterable[HostnameRecord]) -> list[Row]:
    """`known`: all names of users."""
    rows = kept.read(connection, owned={record.hostname for record in known if record.owned})
    rows += answer_rows(certificates.list_answers(connection))
    rows += [ticket_row(record) for record in certificates.list_ticket_keys(connection)]
    rows += [address_row(record) for record in addresses.list_addresses(connection) if record.kind in _KINDS]
    return rows


def hostname_rows(connection: Connection, hostname: str, *, gone: Iterable[AnswerRecord] = ()) -> list[Row]:
    """Everything about one name as it is now. `gone`: answers that were taken back just before."""
    record = hostnames.find_hostname(connection, hostname)
    known = {found.name: found for found in certificates.list_certificates(connection, hostname=hostname)}
    rows = [row("routes", f"host/{hostname}", HostRow(app=record.app) if record else None)]
    for source in SOURCES:
        name = certificate_name(source, hostname)
        served = known.get(name)
        if served is not None and source == "custom" and (record is None or not record.owned):
            served = None
        rows.append(certificate_row(served) if served else row("certs", f"cert/{name}", None))
    answers = certificates.list_answers(connection)
    shown = [answer for answer in answers if answer.kind != "dns"]
    texts = {answer.name for answer in [*answers, *gone] if answer.kind == "dns"}
    rows += answer_rows([answer for answer in shown if answer.hostname == hostname])
    kept = {(answer.kind, answer.name) for answer in answers}
    rows += [row("routes", f"acme/{a.name}", None) for a in gone if a.kind == "http" and (a.kind, a.name) not in kept]
    for name in sorted(texts):
        values = sorted(answer.value for answer in answers if answer.kind == "dns" and answer.name == name)
        rows.append(row("routes", f"txt/{name}", TextRow(values=values) if values else None))
    return rows


def answer_rows(answers: Iterable[AnswerRecord]) -> list[Row]:
    rows: list[Row] = []
    texts: dict[str, list[str]] = {}
    for answer in answers:
        if answer.kind == "http":
            rows.append(row("routes", f"acme/{answer.name}", AcmeRow(authorization=answer.value)))
        else:
            texts.setdefault(answer.name, []).append(answer.value)
    return rows + [row("routes", f"txt/{name}", TextRow(values=sorted(values))) for name, values in texts.items()]


def certificate_row(record: CertificateRecord) -> Row:
    value = CertRow(
        names=msgspec.json.decode(record.names, type=list[str]),
        chain_pem=record.chain_pem,
        not_after_ms=record.not_after_ms,
        sealed_key=record.sealed_key,
        alpn=record.alpn,
    )
    return row("certs", f"cert/{record.name}", value)


def ticket_row(record: TicketKeyRecord) -> Row:
    value = TicketRow(
        not_before_ms=record.not_before_ms, not_after_ms=record.not_after_ms, sealed_key=record.sealed_key
    )
    return row("certs", f"ticket/{record.id}", value)


def address_row(record: AddressRecord) -> Row:
    """Of one that belongs to a single app."""
    value = AddressRow(kind=_KINDS[record.kind], app=record.app, network=record.network_id)
    return row("routes", f"addr/{record.address}", value)


def row(stream: str, key: str, value: Any) -> Row:
    return Row(stream, key, None if value is None else msgspec.to_builtins(value))
