"""A certificate authority of control's own: a key and a self-signed certificate in a folder. They must not stand in for
each other: the platform's names' (`certificates.py`), users' names' in a box (`own_names.py`), the cluster's
(`cluster_authority.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from pantala.control.registry_tokens import private_pem
from pantala.kit.clock import Clock, unix_ms
from pantala.kit.files import write_private

AUTHORITY_LIVES = timedelta(days=3650)
BACKDATED = timedelta(hours=1)


class SigningAuthority:
    """Kept in `folder` as `ca.pem` and `ca.key`; made on first use. It may sign only under `domains` (name
    constraints), so trusting it trusts it with nothing else; without any it may sign for every name."""

    def __init__(self, folder: Path, clock: Clock, *, name: str, domains: Sequence[str]) -> None:
        self._clock = clock
        self.certificate_path = folder / "ca.pem"
        key_path = folder / "ca.key"
        if not (key_path.exists() and self.certificate_path.exists()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._self_signed(key, name, domains)
            write_private(key_path, private_pem(key))
            self.certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        self.certificate_pem = self.certificate_path.read_text()
        self._certificate = x509.load_pem_x509_certificate(self.certificate_pem.encode())

    def sign(
        self,
        key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
        *,
        subject: str,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        lives: timedelta,
    ) -> tuple[str, int]:
        """A certificate for `key` in PEM, without the authority's, and when it ends in Unix ms."""
        now = self._clock.now()
        not_after = now + lives
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_common_name(subject))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode(), unix_ms(not_after)

    def _self_signed(self, key: ec.EllipticCurvePrivateKey, name: str, domains: Sequence[str]) -> x509.Certificate:
        now = self._clock.now()
        permitted = [x509.DNSName(domain) for domain in dict.fromkeys(domains)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(_common_name(name))
            .issuer_name(_common_name(name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + AUTHORITY_LIVES)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if permitted:
            builder = builder.add_extension(x509.NameConstraints(permitted, None), critical=True)
        return builder.sign(key, hashes.SHA256())


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
