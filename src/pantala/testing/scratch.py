"""Short folders below /tmp for what has sockets and mounts; a run that was killed leaves them to the next one."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

ABOVE = Path("/tmp")  # noqa: S108 - a fresh name for each


def scratch(what: str) -> Path:
    """A path that is not there yet, `/tmp/pantala-<what>-<pid>-<random>`. What processes that are gone had there under
    the same word is removed, mounts first."""
    for left in ABOVE.glob(f"pantala-{what}-*-*"):
        pid = left.name.split("-")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            remove(left)
    return ABOVE / f"pantala-{what}-{os.getpid()}-{secrets.token_hex(4)}"


def remove(folder: Path) -> None:
    """With all that is mounted in it."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)
    shutil.rmtree(folder, ignore_errors=True)
