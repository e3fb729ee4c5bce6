"""Certificates: the box's own authority and what it issues to the edges. Owns the table certificates.

One wildcard for `*.<app_domain>` and one certificate for the platform's names; ECDSA P-256, keys sealed to the edge key
before they are stored or published. The authority may sign only under these two domains (name constraints), so
trusting it on a laptop trusts it with nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import anyio.to_thread
import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pantala.control.context import Context
from pantala.control.edge_keys import EdgeKeys
from pantala.control.publication import Publication
from pantala.control.registry_tokens import private_pem
from pantala.errors import PantalaError
from pantala.kit.clock import Clock, unix_ms
from pantala.kit.files import write_private
from pantala.kit.sealing import seal
from pantala.store import ledger
from pantala.store.records import CertificateRecord

log = structlog.get_logger()

LEAF_LIVES = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
AUTHORITY_LIVES = timedelta(days=3650)
LOOK_EVERY_S = 3600.0
RETRY_S = 10.0
BACKDATED = timedelta(hours=1)


class Authority:
    """The box CA, kept in `folder` as `ca.pem` and `ca.key`; made on first use."""

    def __init__(self, folder: Path, clock: Clock, *, domains: Sequence[str]) -> None:
        self._clock = clock
        self.certificate_path = folder / "ca.pem"
        key_path = folder / "ca.key"
        if not (key_path.exists() and self.certificate_path.exists()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._self_signed(key, domains)
            write_private(key_path, private_pem(key))
            self.certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        self._certificate = x509.load_pem_x509_certificate(self.certificate_path.read_bytes())

    def issue(self, names: Sequence[str]) -> tuple[str, bytes, int]:
        """A chain (leaf, then the authority) in PEM, its private key in PEM, and when it ends in Unix ms."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = self._clock.now()
        not_after = now + LEAF_LIVES
        leaf = (
            x509.CertificateBuilder()
            .subject_name(_common_name(names[0]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        chain = leaf.public_bytes(pem) + self._certificate.public_bytes(pem)
        return chain.decode(), private_pem(key), unix_ms(not_after)

    def _self_signed(self, key: ec.EllipticCurvePrivateKey, domains: Sequence[str]) -> x509.Certificate:
        now = self._clock.now()
        permitted = [x509.DNSName(domain) for domain in dict.fromkeys(domains)]
        return (
            x509.CertificateBuilder()
            .subject_name(_common_name("Pantala box authority"))
            .issuer_name(_common_name("Pantala box authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + AUTHORITY_LIVES)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.NameConstraints(permitted, None), critical=True)
            .sign(key, hashes.SHA256())
        )


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
        kept = {record.name: record for record in await self._context.db.read(ledger.list_certificates)}
        issued: list[str] = []
        for name, names in self._wanted().items():
            if self._good(kept.get(name), names, edge_key):
                continue
            await self._issue(name, names, edge_key)
            issued.append(name)
        if issued:
            await self._publication.publish_certificates()
            log.info("certificates issued", names=issued)
        return issued

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
        await self._context.db.write(lambda c: ledger.put_certificate(c, record))


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
