"""The cluster's own authority: it says which host is which, to other hosts only.

Another one than the edges' (`certificates.py`): laptops trust that one, and a host's certificate must not open a web
site nor the other way round. It may sign only under `node.pantala.internal`.
"""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pantala.control.registry_tokens import private_pem
from pantala.errors import InvalidRequest
from pantala.kit.clock import Clock, unix_ms
from pantala.kit.files import write_private
from pantala.wire.hosts import NODE_DOMAIN

NODE_LIVES = timedelta(days=30)
AUTHORITY_LIVES = timedelta(days=3650)
BACKDATED = timedelta(hours=1)
CSR_BYTES_MAX = 16 * 1024


class ClusterAuthority:
    """Kept in `folder` as `ca.pem` and `ca.key`; made on first use."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._clock = clock
        path, key_path = folder / "ca.pem", folder / "ca.key"
        if not (path.exists() and key_path.exists()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            key = ec.generate_private_key(ec.SECP256R1())
            write_private(key_path, private_pem(key))
            path.write_bytes(self._self_signed(key).public_bytes(serialization.Encoding.PEM))
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        self.certificate_pem = path.read_text()
        self._certificate = x509.load_pem_x509_certificate(self.certificate_pem.encode())

    def sign(self, csr_pem: str, node: str, address: str) -> tuple[str, int]:
        """The node's certificate for the key of this request, and when it ends in Unix ms. Nothing but the key is
        taken from the request. It also names the address, by which the bus's servers find one another. Raises
        InvalidRequest."""
        key = public_key_of(csr_pem)
        now = self._clock.now()
        not_after = now + NODE_LIVES
        names = [x509.DNSName(f"{node}.{NODE_DOMAIN}"), x509.IPAddress(ipaddress.ip_address(address))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(node))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode(), unix_ms(not_after)

    def _self_signed(self, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        now = self._clock.now()
        return (
            x509.CertificateBuilder()
            .subject_name(_name("Pantala cluster authority"))
            .issuer_name(_name("Pantala cluster authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + AUTHORITY_LIVES)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.NameConstraints([x509.DNSName(NODE_DOMAIN)], None), critical=True)
            .sign(key, hashes.SHA256())
        )


def public_key_of(csr_pem: str) -> ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey:
    """The key that signed this request. Raises InvalidRequest for anything but P-256 or Ed25519, or a wrong
    signature (then nobody proved to have the key)."""
    if len(csr_pem) > CSR_BYTES_MAX:
        raise InvalidRequest(f"may have {CSR_BYTES_MAX} bytes", field="csr_pem")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        valid = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise InvalidRequest(f"is not a certificate request in PEM: {error}", field="csr_pem") from error
    if not valid:
        raise InvalidRequest("is not signed by the key it is for", field="csr_pem")
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise InvalidRequest("must be for an ECDSA P-256 or an Ed25519 key", field="csr_pem")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


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
