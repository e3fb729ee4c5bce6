"""A disk without room: how it is recognised, what is said about it, and how much of it the platform keeps to itself."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pantala.errors import DiskFull

RESERVE_BYTES_MAX = 256 * 1024**2
RESERVE_PART = 20
"""Images and builds leave a twentieth of a disk, at most 256 MiB: journals and databases may live on it too."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_SQLITE_FULL = 13
_SQLITE_UNCLEAR = frozenset({10, 14})
"""SQLITE_IOERR and SQLITE_CANTOPEN; numbers, because the helper that unpacks layers has no use for all of sqlite3."""
_SMALL_BYTES = 128 * 1024
_UNITS = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))


def is_full(error: BaseException, path: Path) -> bool:
    """Whether this is what a full disk makes of a write below `path`."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    # SQLite cannot always tell why the file beside the database (shared memory, write-ahead log) did not grow.
    return code == _SQLITE_FULL or (code in _SQLITE_UNCLEAR and _free_bytes(path) < _SMALL_BYTES)


def disk_full(what: str, path: Path) -> DiskFull:
    """`what`: what there is no room for, as in `the image registry.test/app`."""
    return DiskFull(
        f"no room for {what}: {_state(path)}", hint="free some space there or give it a larger disk, then try again"
    )


@contextmanager
def room_for(what: str, path: Path) -> Generator[None]:
    """Writing below `path`. Raises DiskFull instead of the OSError of a full disk."""
    try:
        yield
    except OSError as error:
        if not is_full(error, path):
            raise
        raise disk_full(what, path) from error


def has_room(path: Path) -> bool:
    """Whether more is left of the disk than what the platform keeps to itself."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize >= _reserve_bytes(found)


def check_reserve(path: Path) -> None:
    """Raises OSError (ENOSPC) unless the disk `has_room`."""
    if not has_room(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _state(path: Path) -> str:
    try:
        found = os.statvfs(path)
    except OSError:
        return f"the disk of {path} is full"
    if found.f_files and not found.f_favail:
        return f"the disk of {path} holds as many files as it can"
    free = found.f_bavail * found.f_frsize
    sentence = f"the disk of {path} is full, {_readable(free)} of {_readable(found.f_blocks * found.f_frsize)} are free"
    return sentence if free < _SMALL_BYTES else f"{sentence}, {_readable(_reserve_bytes(found))} must stay free"


def _reserve_bytes(found: os.statvfs_result) -> int:
    return min(RESERVE_BYTES_MAX, found.f_blocks * found.f_frsize // RESERVE_PART)


def _free_bytes(path: Path) -> int:
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _readable(size: int) -> str:
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def remove_tree(path: Path) -> None:
    """A foreign tree, which may be deeper than Python can go; what cannot be removed stays, nothing is raised."""
    if path.is_dir() and not path.is_symlink():
        subprocess.run(["rm", "-rf", "--one-file-system", "--", str(path)], stderr=subprocess.DEVNULL, check=False)
