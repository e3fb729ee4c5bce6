"""OCI references, registries, and images as root file systems; bases made from Debian packages."""

from __future__ import annotations

from pathlib import Path

from pantala.images.registry import RegistryClient
from pantala.images.store import FileImageStore


def open_store(*, state_dir: Path, registries: dict[str, str]) -> FileImageStore:
    """The image store of one host; `registries` gives registry names their base URLs."""
    return FileImageStore(state_dir, RegistryClient(endpoints=registries))
