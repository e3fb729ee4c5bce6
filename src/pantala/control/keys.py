"""The cluster key: what secrets are sealed to on arrival, and what keyed digests are made with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pantala.kit.sealing import Opener, ensure_key, seal


class ClusterKey:
    def __init__(self, key: bytes) -> None:
        self._opener = Opener(key)
        self._digest_key = hashlib.blake2b(key, person=b"pantala-digest").digest()

    @classmethod
    def load(cls, path: Path) -> ClusterKey:
        return cls(ensure_key(path))

    def seal(self, data: bytes) -> str:
        return seal(self._opener.public_key, data)

    def open(self, sealed: str) -> bytes:
        return self._opener.open(sealed)

    def digest(self, data: bytes, *, purpose: str) -> str:
        """16 hex characters; keyed, so that a short secret cannot be guessed from what lists show."""
        keyed = hashlib.blake2b(data, key=self._digest_key, digest_size=8, person=purpose.encode()[:16])
        return keyed.hexdigest()
