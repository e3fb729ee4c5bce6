"""What edges answer to a certificate authority, put up before it is told to look and taken down afterwards.

HTTP-01: a row per token. TLS-ALPN-01: a certificate that is shown to nobody else. DNS-01: a TXT record in our own zone,
to which the user's CNAME leads.
"""

from __future__ import annotations

from datetime import timedelta

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection

from pantala.control.acme import Refused, Task, challenge_certificate
from pantala.control.context import Context
from pantala.control.edge_keys import EdgeKeys
from pantala.control.edge_rows import certificate_name
from pantala.control.name_records import NameRecords
from pantala.control.publication import Publication
from pantala.control.registry_tokens import private_pem
from pantala.kit.clock import unix_ms
from pantala.kit.sealing import seal
from pantala.store import certificates
from pantala.store.records import AnswerRecord, CertificateRecord, HostnameRecord, OrderRecord

ALPN = "acme-tls/1"
CHALLENGE_LIVES = timedelta(days=2)


class Answers:
    """Owns the table acme_answers."""

    def __init__(self, context: Context, publication: Publication, edge_keys: EdgeKeys, records: NameRecords) -> None:
        self._context = context
        self._publication = publication
        self._edge_keys = edge_keys
        self._records = records

    async def put_up(self, record: HostnameRecord, order: OrderRecord, task: Task) -> None:
        """Repeats safely."""
        match order.challenge:
            case "http-01":
                await self._put(record, kind="http", name=task.token, value=task.authorization)
            case "dns-01":
                target = self._records.challenge_target(record.app_id, record.hostname)
                await self._put(record, kind="dns", name=target, value=task.txt)
            case "tls-alpn-01":
                await self._show(record, task)
            case _:
                raise Refused(f"{order.challenge} is none of our challenges", code="challenge")
        await self._publication.publish_hostname(record.hostname)

    async def take_down(self, hostname: str) -> None:
        """With the order."""
        gone = await self._context.db.write(lambda c: certificates.end_order(c, hostname))
        await self._publication.publish_hostname(hostname, gone=gone)

    async def _put(self, record: HostnameRecord, *, kind: str, name: str, value: str) -> None:
        answer = AnswerRecord(hostname=record.hostname, kind=kind, name=name, value=value)
        await self._context.db.write(lambda c: certificates.put_answer(c, answer))

    async def _show(self, record: HostnameRecord, task: Task) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        now = self._context.clock.now()
        chain = challenge_certificate(key, record.hostname, task.digest, now=now, lives=CHALLENGE_LIVES)
        edge_key = await self._edge_keys.public()
        shown = CertificateRecord(
            name=certificate_name("challenge", record.hostname),
            names=msgspec.json.encode([record.hostname]).decode(),
            chain_pem=chain,
            sealed_key=seal(edge_key, private_pem(key)),
            sealed_to=edge_key,
            not_after_ms=unix_ms(now + CHALLENGE_LIVES),
            issued_at_ms=unix_ms(now),
            hostname=record.hostname,
            source="challenge",
            kept_key=self._context.key.seal(private_pem(key)),
            alpn=ALPN,
        )

        def keep(connection: Connection) -> None:
            certificates.put_certificate(connection, shown)

        await self._context.db.write(keep)
