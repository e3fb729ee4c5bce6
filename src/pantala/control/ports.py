"""What the use cases ask of parts that they do not know: a registry and a builder. Composed in `server/main.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from pantala.kit.secret import Secret
from pantala.wire.api import BuildEvent, BuildOptions
from pantala.wire.machine import ImageRef


class Registry(Protocol):
    async def resolve(self, image: str, *, token: str) -> ImageRef:
        """The reference with the digest that its tag has now. `token`: a bearer token for our own registry, or "".

        Raises NotFound (no such image), InvalidRequest (not an image reference), TransientError (not reachable).
        """
        ...


class Builder(Protocol):
    def build(
        self, *, app: str, context_dir: Path, options: BuildOptions, image: str, push_token: Secret
    ) -> AsyncIterator[BuildEvent]:
        """Build the context and push it as `image`; the last event is `done` (with digest) or `failed`.

        `push_token` is the registry's: it may push the image and read the bases.

        The context is the caller's to remove. Closing the iterator stops the build.
        """
        ...
