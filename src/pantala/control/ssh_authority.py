"""The keys whose SSH certificates machines believe; they never leave control.

Two in `folder`: `current.key` signs, `next.key` is believed already, so that there is a successor which every machine
knows since its start. To change them the operator removes `current.key` and starts the server again: next becomes
current, and a new next is made. Machines that run believe the removed one until their next start.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import SSHCertificateBuilder, SSHCertificateType

from pantala.errors import InternalError
from pantala.kit.files import write_private

BACKDATED_S = 60
"""Clocks of hosts differ a little."""
EXTENSIONS = (b"permit-port-forwarding", b"permit-pty")


class SshAuthority:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        current, following = folder / "current.key", folder / "next.key"
        if not current.exists() and following.exists():
            following.rename(current)
        self._key = _ensure(current)
        self.public_keys = [_openssh(self._key), _openssh(_ensure(following))]

    def sign(
        self, key: Ed25519PublicKey, *, key_id: str, principals: Sequence[str], now_s: int, until_s: int
    ) -> tuple[str, int]:
        """The certificate as a line, and its serial."""
        serial = secrets.randbits(63)
        certificate = (
            SSHCertificateBuilder()
            .public_key(key)
            .serial(serial)
            .type(SSHCertificateType.USER)
            .key_id(key_id.encode())
            .valid_principals([principal.encode() for principal in principals])
            .valid_after(now_s - BACKDATED_S)
            .valid_before(until_s)
        )
        for extension in EXTENSIONS:
            certificate = certificate.add_extension(extension, b"")
        return certificate.sign(self._key).public_bytes().decode(), serial


def _ensure(path: Path) -> Ed25519PrivateKey:
    if not path.exists():
        made = Ed25519PrivateKey.generate()
        write_private(
            path,
            made.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
    loaded = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(loaded, Ed25519PrivateKey):
        raise InternalError(f"{path} holds no Ed25519 key")
    return loaded


def _openssh(key: Ed25519PrivateKey) -> str:
    encoded = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return encoded.decode()
