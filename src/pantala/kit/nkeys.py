"""Keys and credentials as NATS writes them: nkeys (Ed25519 in base32 with a checksum), JWTs signed by them, and the
credentials file that holds a user's JWT and seed.

By hand over PyNaCl because it is little: the package `nkeys` would bring nothing else. Control signs with it
(`control/bus_accounts.py`), hosts make their user key with it, `kit/bus_nats.py` proves who it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from pantala.errors import InvalidRequest
from pantala.kit.files import write_private
from pantala.kit.sealing import Signer, b64, unb64, verify

Kind = Literal["operator", "account", "user"]

PREFIX: dict[Kind, int] = {"operator": 14 << 3, "account": 0, "user": 20 << 3}
_KINDS: dict[int, Kind] = {value: kind for kind, value in PREFIX.items()}
_SEED = 18 << 3
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_BLOCK = re.compile(r"-+BEGIN ([A-Z ]+)-+\s+(\S+)\s+-+END [A-Z ]+-+")


class NKey:
    """The private half of an nkey."""

    def __init__(self, kind: Kind, raw_seed: bytes) -> None:
        self.kind: Kind = kind
        self._raw = raw_seed
        self._signer = Signer(raw_seed)
        self.public = _encode(bytes([PREFIX[kind]]) + unb64(self._signer.verify_key))

    @classmethod
    def from_seed(cls, seed: str) -> NKey:
        data = _decode(seed, field="seed")
        prefix = ((data[0] & 7) << 5) | (data[1] >> 3)
        kind = _KINDS.get(prefix)
        if data[0] & 0xF8 != _SEED or kind is None or len(data) != 34:
            raise InvalidRequest("is not the seed of an operator, an account or a user", field="seed")
        return cls(kind, data[2:])

    @classmethod
    def ensure(cls, kind: Kind, path: Path) -> NKey:
        """The key whose seed is kept in `path` (mode 0600), made on first use."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(path, cls(kind, os.urandom(32)).seed.encode())
        return cls.from_seed(path.read_text().strip())

    @property
    def seed(self) -> str:
        prefix = PREFIX[self.kind]
        return _encode(bytes([_SEED | prefix >> 5, (prefix & 31) << 3]) + self._raw)

    def sign(self, data: bytes) -> bytes:
        return self._signer.sign(data)

    def jwt(self, *, subject: str, name: str, issued_at_s: int, expires_at_s: int = 0, nats: dict[str, Any]) -> str:
        """A NATS JWT (version 2) about `subject`, issued by this key."""
        claims: dict[str, Any] = {"iss": self.public, "sub": subject, "name": name, "iat": issued_at_s, "nats": nats}
        if expires_at_s:
            claims["exp"] = expires_at_s
        digest = hashlib.sha512(_json(claims)).digest()[:32]
        claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
        signed = f"{_base64url(_json(_HEADER))}.{_base64url(_json(claims))}"
        return f"{signed}.{_base64url(self.sign(signed.encode()))}"


def check_public(text: str, kind: Kind, *, field: str) -> None:
    """Raises InvalidRequest unless this is a public key of that kind."""
    data = _decode(text, field=field)
    if len(data) != 33 or data[0] != PREFIX[kind]:
        raise InvalidRequest(f"is not the public nkey of a {kind} (it begins with {kind[0].upper()})", field=field)


def claims_of(jwt: str) -> dict[str, Any]:
    """What a JWT says, if its issuer signed it. Raises InvalidRequest."""
    try:
        signed, _, signature = jwt.rpartition(".")
        claims: dict[str, Any] = json.loads(_unbase64url(signed.split(".")[1]))
        issuer = b64(_decode(str(claims["iss"]), field="iss")[1:])
    except (ValueError, IndexError, KeyError) as error:
        raise InvalidRequest("is not a NATS JWT", field="jwt") from error
    if not verify(issuer, signed.encode(), _unbase64url(signature)):
        raise InvalidRequest("its signature is not its issuer's", field="jwt")
    return claims


# -- credentials files -----------------------------------------------------------------------------------------------


def credentials_text(user_jwt: str, key: NKey) -> str:
    """As `nats-server` and every NATS client read it."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{key.seed}\n------END USER NKEY SEED------\n"
    )


def read_credentials(path: Path) -> tuple[str, NKey]:
    """JWT and key of a credentials file. Raises InvalidRequest naming the file."""
    try:
        blocks = dict(_BLOCK.findall(path.read_text()))
    except OSError as error:
        raise InvalidRequest(f"cannot be read: {error.strerror}", field=str(path)) from error
    jwt, seed = blocks.get("NATS USER JWT"), blocks.get("USER NKEY SEED")
    if jwt is None or seed is None:
        raise InvalidRequest("holds no NATS user JWT with its seed", field=str(path))
    return jwt, NKey.from_seed(seed)


# -- footnotes -------------------------------------------------------------------------------------------------------


def _encode(data: bytes) -> str:
    return base64.b32encode(data + _crc16(data).to_bytes(2, "little")).decode().rstrip("=")


def _decode(text: str, *, field: str) -> bytes:
    try:
        data = base64.b32decode(text + "=" * (-len(text) % 8))
    except ValueError as error:
        raise InvalidRequest("is not an nkey: not base32", field=field) from error
    if len(data) < 4 or _crc16(data[:-2]) != int.from_bytes(data[-2:], "little"):
        raise InvalidRequest("is not an nkey: its checksum is wrong", field=field)
    return data[:-2]


def _crc16(data: bytes) -> int:
    """CRC-16/XMODEM."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
        crc &= 0xFFFF
    return crc


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
