"""What the use cases ask of parts that they do not know: a registry, a builder, a store of files, the nodes as they
show themselves.
Composed in `server/compose.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

from pantala.kit.secret import Secret
from pantala.wire.api import BuildEvent, BuildOptions
from pantala.wire.feed import MachineRow, NodeRow
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


class Objects(Protocol):
    """The operator's S3-compatible store, `buckets/store.py`. Raises UserError for what the operator has to mend,
    TransientError when the store does not answer."""

    async def put(self, bucket: str, key: str, content: IO[bytes] | bytes, *, size: int, content_type: str) -> None: ...

    async def get(self, bucket: str, key: str, *, bytes_max: int) -> bytes:
        """Raises NotFound."""
        ...

    async def copy(self, bucket: str, source: str, key: str) -> None:
        """Raises NotFound."""
        ...

    async def list_sizes(self, bucket: str, prefix: str) -> dict[str, int]: ...

    async def list_names(self, bucket: str, folder: str) -> tuple[list[str], list[str]]:
        """What is right in the folder (`…/`): keys of objects, and folders with their slash."""
        ...

    async def delete(self, bucket: str, keys: Sequence[str]) -> None: ...


class Sightings(Protocol):
    """What nodes say of themselves and of their machines; `catalogue/sightings.py`."""

    def node(self, node_id: str) -> NodeRow | None: ...

    def machine(self, machine_id: str) -> MachineRow | None: ...

    def heard_at(self, node_id: str) -> float | None:
        """Monotonic time of the newest word of a node; None: none since this process runs."""
        ...

    def ahead_ms(self, node_id: str) -> int | None:
        """What the node's clock shows more than our monotonic one, in milliseconds; None: it has not said."""
        ...

    def listen(self, on_change: Callable[[str], None]) -> None:
        """Called with a node's id when its row changes or is gone."""
        ...


class NothingSeen:
    """Where no node is asked for anything (bootstrapping)."""

    def node(self, node_id: str) -> NodeRow | None:
        return None

    def machine(self, machine_id: str) -> MachineRow | None:
        return None

    def heard_at(self, node_id: str) -> float | None:
        return None

    def ahead_ms(self, node_id: str) -> int | None:
        return None

    def listen(self, on_change: Callable[[str], None]) -> None:
        pass
