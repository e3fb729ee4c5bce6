"""How one may log in to a machine: what `pantala-init` is told at its start.

The authorities come from control through the catalogue, so that they are known while control is away; a certificate
must name the machine's app and org. The host key is made from a secret of this host and the machine's id, so it is the
same at every start here and nothing of it needs keeping.
"""

from __future__ import annotations

from typing import Any, Protocol

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pantala.journal import MachineRecord
from pantala.wire.guest import SSH

PORT = 22


class Rows(Protocol):
    """The catalogue's view, as far as it is needed here."""

    def get(self, stream: str, key: str) -> dict[str, Any] | None: ...


class SshDoors:
    def __init__(self, rows: Rows, secret: bytes) -> None:
        self._rows = rows
        self._secret = secret

    def of(self, record: MachineRecord) -> SSH | None:
        """None while no authority is known."""
        row = self._rows.get("certs", "ssh/authorities")
        if row is None or not row.get("authorities"):
            return None
        return SSH(
            listen=f"[{record.ip6}]:{PORT}",
            authorities=[str(key) for key in row["authorities"]],
            principals=[f"{record.app.org}/{record.app.name}"],
            host_key=host_key(self._secret, record.id),
        )


def host_key(secret: bytes, machine_id: str) -> str:
    seed = HKDF(hashes.SHA256(), length=32, salt=None, info=b"ssh host key " + machine_id.encode()).derive(secret)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ).decode()
