"""Certificates of the platform's own names: the box's own authority and what it issues to the edges. Those of users'
names: `hostnames.py`, `issuance.py`.

One wildcard for `*.<app_domain>` and one certificate for the platform's names; ECDSA P-256, keys sealed to the edge key
before they are stored or published. The authority may sign only under these two domains (name constraints), so
trusting it on a laptop trusts it with nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import anyio.to_thread
import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pantala.control.context import Context
from pantala.control.edge_keys import EdgeKeys
from pantala.control.publication import Publication
from pantala.control.registry_tokens import private_pem
from pantala.control.signing_authority import SigningAuthority
from pantala.errors import PantalaError
from pantala.kit.clock import Clock
from pantala.kit.sealing import seal
from pantala.store import certificates
from pantala.store.records import CertificateRecord

log = structlog.get_logger()

LEAF_LIVES = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
LOOK_EVERY_S = 3600.0
RETRY_S = 10.0
RESEALED_AT_ONCE = 100


class Authority:
    """The box CA."""

    def __init__(self, folder: Path, clock: Clock, *, domains: Sequence[str]) -> None:
        self._authority = SigningAuthority(folder, clock, name="Pantala box authority", domains=domains)
        self.certificate_path = self._authority.certificate_path

    def issue(self, names: Sequence[str]) -> tuple[str, bytes, int]:
        """A chain (leaf, then the authority) in PEM, its private key in PEM, and when it ends in Unix ms."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf_pem, not_after_ms = self._authority.sign(
            key.public_key(),
            subject=names[0],
            names=[x509.DNSName(name) for name in names],
            usages=[ExtendedKeyUsageOID.SERVER_AUTH],
            lives=LEAF_LIVES,
        )
        return leaf_pem + self._authority.certificate_pem, private_pem(key), not_after_ms


class Certificates:
    def __init__(self, context: Context, authority: Authority, publication: Publication, edge_keys: EdgeKeys) -> None:
        self._context = context
        self._authority = authority
        self._publication = publication
        self._edge_keys = edge_keys

    async def run(self) -> None:
        while True:
            try:
                await self.ensure()
                wait_s = LOOK_EVERY_S
            except PantalaError:
                log.exception("certificates not renewed")
                wait_s = RETRY_S
            await self._context.clock.sleep(wait_s)

    async def ensure(self) -> list[str]:
        """Issue what is missing, ends soon, has other names or was sealed to an older edge key; the names issued."""
        edge_key = await self._edge_keys.public()
        kept = {
            record.name: record
            for record in await self._context.db.read(lambda c: certificates.list_certificates(c, source="platform"))
        }
        issued: list[str] = []
        for name, names in self._wanted().items():
            if self._good(kept.get(name), names, edge_key):
                continue
            await self._issue(name, names, edge_key)
            issued.append(name)
        resealed = await self._reseal(edge_key)
        if issued or resealed:
            await self._publication.publish_certificates()
            log.info("certificates issued", names=issued, resealed=resealed)
        return issued

    async def _reseal(self, edge_key: str) -> int:
        """Users' certificates stay what they are when the edge key changes: their keys are sealed to the new one."""
        resealed = 0
        while records := await self._context.db.read(
            lambda c: certificates.list_sealed_otherwise(c, edge_key, limit=RESEALED_AT_ONCE)
        ):
            for record in records:
                sealed = seal(edge_key, self._context.key.open(record.kept_key))
                await self._context.db.write(
                    partial(certificates.reseal, record=record, sealed_key=sealed, sealed_to=edge_key)
                )
            resealed += len(records)
        return resealed

    def _wanted(self) -> dict[str, list[str]]:
        settings = self._context.settings
        registry = settings.registry.partition(":")[0]
        return {
            f"*.{settings.app_domain}": [f"*.{settings.app_domain}"],
            f"api.{settings.platform_domain}": [f"api.{settings.platform_domain}", registry],
        }

    def _good(self, record: CertificateRecord | None, names: list[str], edge_key: str) -> bool:
        return (
            record is not None
            and record.sealed_to == edge_key
            and msgspec.json.decode(record.names) == names
            and record.not_after_ms > self._context.now_ms() + int(RENEW_BEFORE.total_seconds() * 1000)
        )

    async def _issue(self, name: str, names: list[str], edge_key: str) -> None:
        chain, key, not_after_ms = await anyio.to_thread.run_sync(self._authority.issue, names)
        record = CertificateRecord(
            name=name,
            names=msgspec.json.encode(names).decode(),
            chain_pem=chain,
            sealed_key=seal(edge_key, key),
            sealed_to=edge_key,
            not_after_ms=not_after_ms,
            issued_at_ms=self._context.now_ms(),
        )
        await self._context.db.write(lambda c: certificates.put_certificate(c, record))
