"""Which files are behind loop devices, as the kernel tells everyone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def loop_files() -> set[str]:
    """Paths of files behind loop devices."""
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir("/sys/block") if entry.name.startswith("loop")]
        return {path for name in names if (path := loop_file(name)) is not None}
    return set()


def loop_file(name: str) -> str | None:
    """The path of the file behind one loop device; None where there is none."""
    try:
        return Path(f"/sys/block/{name}/loop/backing_file").read_text().strip().removesuffix(" (deleted)")
    except OSError:
        return None
