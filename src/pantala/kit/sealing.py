"""Sealed boxes (X25519) and signatures (Ed25519) over PyNaCl; keys travel as base64 text."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from nacl.exceptions import BadSignatureError, CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox
from nacl.signing import SigningKey, VerifyKey

from pantala.errors import InternalError, InvalidRequest


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def seal(public_key: str, data: bytes) -> str:
    """Only the holder of the private key can open it; who sealed it is not known."""
    return b64(SealedBox(PublicKey(unb64(public_key))).encrypt(data))


class Opener:
    """The private half of a sealing key."""

    def __init__(self, private_key: bytes) -> None:
        self._key = PrivateKey(private_key)
        self.public_key = b64(bytes(self._key.public_key))

    def open(self, sealed: str) -> bytes:
        """Raises InvalidRequest when it was sealed to another key or altered."""
        try:
            return SealedBox(self._key).decrypt(unb64(sealed))
        except (CryptoError, ValueError) as error:
            raise InvalidRequest("sealed to another key, or altered", field="sealed") from error


class Signer:
    """The private half of a signing key."""

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.verify_key = b64(bytes(self._key.verify_key))

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data).signature


def verify(verify_key: str, data: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(unb64(verify_key)).verify(data, signature)
    except (BadSignatureError, ValueError):
        return False
    return True


def ensure_key(path: Path) -> bytes:
    """The 32 bytes kept in `path` (mode 0600), made on first use."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_suffix(f".{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, os.urandom(32))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fresh.rename(path)
        data = path.read_bytes()
    if len(data) != 32:
        raise InternalError(f"the key file {path} has {len(data)} bytes, not 32")
    return data
