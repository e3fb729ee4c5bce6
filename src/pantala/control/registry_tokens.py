"""Tokens for the registry: who may pull and push which repository.

JWT signed with ES256 whose `x5c` header carries our certificate; the registry trusts it by `rootcertbundle`
(`distribution`'s token authentication, docker-registry 2.8.2 and later).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from pantala.errors import InvalidRequest
from pantala.kit import ids
from pantala.kit.clock import Clock
from pantala.kit.files import write_private

SERVICE = "pantala-registry"
ISSUER = "pantala"
LIVES = timedelta(hours=1)
CLOCK_SKEW = timedelta(minutes=1)
ACTIONS = ("pull", "push")


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """`repository:<name>:pull,push`."""

    repository: str
    actions: tuple[str, ...]


def parse_scope(text: str) -> Scope | None:
    """None for what is not about a repository (a catalogue listing, say): the registry then refuses by itself."""
    kind, _, rest = text.partition(":")
    repository, _, actions = rest.rpartition(":")
    if kind != "repository":
        return None
    if not repository:
        raise InvalidRequest("must look like repository:<app>:pull,push", field="scope")
    return Scope(repository=repository, actions=tuple(a for a in actions.split(",") if a in ACTIONS))


class RegistryTokens:
    """Keeps its key and certificate in `folder`; `bundle` is the file for the registry's `rootcertbundle`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._clock = clock
        self.bundle = folder / "token.pem"
        self._key, certificate = _ensure_pair(folder / "token.key", self.bundle, clock)
        self._chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]

    def issue(self, subject: str, repository: str, actions: Sequence[str]) -> str:
        access = [{"type": "repository", "name": repository, "actions": list(actions)}] if actions else []
        return self.sign(subject, access)

    def sign(self, subject: str, access: list[dict[str, Any]]) -> str:
        now = self._clock.now()
        claims = {
            "iss": ISSUER,
            "sub": subject,
            "aud": SERVICE,
            "exp": int((now + LIVES).timestamp()),
            "nbf": int((now - CLOCK_SKEW).timestamp()),
            "iat": int(now.timestamp()),
            "jti": ids.ulid(),
            "access": access,
        }
        header = {"typ": "JWT", "alg": "ES256", "x5c": self._chain}
        signed = f"{_segment(header)}.{_segment(claims)}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _segment(document: dict[str, Any]) -> str:
    return _base64url(json.dumps(document, separators=(",", ":")).encode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _ensure_pair(
    key_path: Path, certificate_path: Path, clock: Clock
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    if key_path.exists() and certificate_path.exists():
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, x509.load_pem_x509_certificate(certificate_path.read_bytes())
    key_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Pantala registry tokens")])
    now = clock.now()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(key_path, private_pem(key))
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
