"""OCI references, registries, and images as root file systems; bases made from Debian packages.

Imports nothing by itself: the helper that unpacks a layer is a module of this package and starts once per layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pantala.domain.runtime import ImageLimits
    from pantala.images.store import FileImageStore


def open_store(*, state_dir: Path, registries: dict[str, str], limits: ImageLimits | None = None) -> FileImageStore:
    """The image store of one host; `registries` gives registry names their base URLs."""
    from pantala.images.registry import RegistryClient
    from pantala.images.store import FileImageStore

    return FileImageStore(state_dir, RegistryClient(endpoints=registries, limits=limits), limits=limits)
