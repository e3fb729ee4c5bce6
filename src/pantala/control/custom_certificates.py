"""Certificates that users bring, judged before they are kept. Nothing of a key is ever repeated in a message."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from pantala.domain.hostnames import covers
from pantala.errors import InvalidRequest
from pantala.kit.clock import unix_ms

CHAIN_BYTES_MAX = 48 * 1024
RSA_BITS_MIN = 2048
_CURVES = ("secp256r1", "secp384r1")


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """`chain_pem` as it is served, the certificate first; `key_pem` in PKCS 8."""

    names: list[str]
    chain_pem: str
    key_pem: bytes
    not_before_ms: int
    not_after_ms: int


def check(hostname: str, *, fullchain: str, private_key: str, now: datetime) -> Checked:
    """Raises InvalidRequest naming the field and what would be right."""
    chain = read_chain(fullchain)
    key = _read_key(private_key)
    leaf = chain[0]
    public = _spki(key.public_key())
    if _spki(leaf.public_key()) != public:
        later = any(_spki(other.public_key()) == public for other in chain[1:])
        hint = "the certificate of the name comes first, then who signed it" if later else None
        raise InvalidRequest("does not belong to the first certificate of fullchain", field="private_key", hint=hint)
    names = names_of(leaf)
    if not covers(names, hostname):
        raise InvalidRequest(
            f"the certificate is for {', '.join(names[:10]) or 'no name'}, not for {hostname}", field="fullchain"
        )
    if leaf.not_valid_after_utc <= now:
        raise InvalidRequest(
            f"the certificate ended on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", field="fullchain"
        )
    if leaf.not_valid_before_utc > now:
        raise InvalidRequest(
            f"the certificate begins only on {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC", field="fullchain"
        )
    _check_order(chain)
    return Checked(
        names=names,
        chain_pem="".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in chain),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        not_before_ms=unix_ms(leaf.not_valid_before_utc),
        not_after_ms=unix_ms(leaf.not_valid_after_utc),
    )


def read_chain(fullchain: str) -> list[x509.Certificate]:
    if len(fullchain) > CHAIN_BYTES_MAX:
        raise InvalidRequest(f"may have {CHAIN_BYTES_MAX} bytes", field="fullchain")
    try:
        chain = x509.load_pem_x509_certificates(fullchain.encode())
    except ValueError as error:
        raise InvalidRequest("must be certificates in PEM, that of the name first", field="fullchain") from error
    return chain


def names_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names it is for; the common name counts where there are none."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = found.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return [name.lower() for name in names]


def _read_key(private_key: str) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(private_key.encode(), password=None)
    except TypeError as error:
        raise InvalidRequest("is encrypted", field="private_key", hint="`openssl pkey -in KEY` decrypts it") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest("must be a private key in PEM", field="private_key") from error
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return key
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= RSA_BITS_MIN:
        return key
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    raise InvalidRequest(f"must be ECDSA P-256 or P-384, Ed25519, or RSA of {RSA_BITS_MIN} bits", field="private_key")


def _check_order(chain: list[x509.Certificate]) -> None:
    for number, (one, issuer) in enumerate(pairwise(chain), start=1):
        try:
            one.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise InvalidRequest(
                f"certificate {number + 1} did not sign certificate {number}",
                field="fullchain",
                hint="each is followed by the one that signed it",
            ) from error


def _spki(key: object) -> bytes:
    encoded = getattr(key, "public_bytes", None)
    assert encoded is not None
    found: bytes = encoded(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return found


def kind_of(certificate: x509.Certificate) -> str:
    return "rsa" if isinstance(certificate.public_key(), rsa.RSAPublicKey) else "ecdsa"


def issuer_of(certificate: x509.Certificate) -> str:
    for oid in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
        if found := certificate.issuer.get_attributes_for_oid(oid):
            return str(found[0].value)
    return certificate.issuer.rfc4514_string()
