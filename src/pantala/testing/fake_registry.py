"""A registry in memory, and what tests look at in tokens for one."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec

from pantala.errors import NotFound, TransientError
from pantala.wire.machine import ImageRef


def image_digest(image: str) -> str:
    return f"sha256:{hashlib.sha256(image.encode()).hexdigest()}"


class FakeRegistry:
    """Resolves every reference but those of `missing`, and none of `unreachable` registries (as references begin)."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.unreachable: tuple[str, ...] = ()
        self.tokens: dict[str, str] = {}

    async def resolve(self, image: str, *, token: str) -> ImageRef:
        self.tokens[image] = token
        if self.unreachable and image.startswith(self.unreachable):
            raise TransientError(f"the registry of {image} does not answer")
        if image in self.missing:
            raise NotFound(f"no such image: {image}")
        name, _, digest = image.partition("@")
        registry, _, rest = name.rpartition("/")
        repository, _, tag = rest.partition(":")
        return ImageRef(
            registry=registry or "docker.io", repository=repository, tag=tag, digest=digest or image_digest(image)
        )


def claims_of(token: str) -> dict[str, Any]:
    """The claims of a JWT, not verified."""
    segment = token.split(".")[1]
    claims: dict[str, Any] = msgspec.json.decode(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    return claims
