"""Unpacking of an uploaded build context: nothing lands, or later points, outside its folder."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import zlib
from pathlib import Path

import msgspec

from pantala.errors import InvalidRequest
from pantala.kit.disk import check_reserve, is_full

FIELD = "context"
TIMES_FROM_NS = 946_684_800 * 10**9
TIMES_NS = 20 * 365 * 86_400 * 10**9
"""Times made from content: in the twenty years after 2000, before any base was made."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    upload_bytes: int = 512 * 1024 * 1024
    unpacked_bytes: int = 2 * 1024 * 1024 * 1024
    entries: int = 200_000


def unpack(archive: Path, folder: Path, bounds: Bounds) -> None:
    """Unpack a tar.gz into the empty `folder`. Raises InvalidRequest naming the entry that must not be unpacked,
    OSError when the disk is full.

    Folders, files and links that stay inside; no devices, no owners, no set-uid bits. A file's time follows from its
    content, whatever the archive says: BuildKit keeps the context that it was sent last, whoever sent it, and takes a
    file of equal path, size and time as unchanged. So an edit is seen, and nobody's file stands in for another's.
    """
    total = 0
    try:
        with tarfile.open(archive, mode="r:gz") as tar:
            for count, member in enumerate(tar, start=1):
                total += member.size if member.isreg() else 0
                if count > bounds.entries or total > bounds.unpacked_bytes:
                    raise InvalidRequest(
                        f"unpacks to more than {bounds.entries} entries or {bounds.unpacked_bytes} bytes",
                        field=FIELD,
                        hint="list what the build does not need in .dockerignore",
                    )
                _unpack_member(tar, member, folder)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if is_full(error, folder):
            raise
        raise InvalidRequest(f"is not a complete tar.gz: {error}", field=FIELD) from error


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = _inside(member.name, member.name)
    if not name:
        return  # the root itself
    target = folder / name
    _plain_parents(folder, target, member.name)
    if member.isdir():
        target.mkdir(exist_ok=True)
    elif member.isreg():
        _write(tar, member, target)
    elif member.issym():
        _inside(posixpath.join(posixpath.dirname(name), member.linkname), member.name, absolute=member.linkname)
        target.symlink_to(member.linkname)
    elif member.islnk():
        source = folder / _inside(member.linkname, member.name)
        _plain_parents(folder, source, member.name)
        os.link(source, target, follow_symlinks=False)
    else:
        raise InvalidRequest(f"the entry {member.name!r} is neither folder, file nor link", field=FIELD)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None
    mode = 0o755 if member.mode & 0o111 else 0o644
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    content = hashlib.sha256()
    with source, os.fdopen(os.open(target, flags, mode), "wb") as out:
        while chunk := source.read(1024 * 1024):
            out.write(chunk)
            check_reserve(target.parent)
            content.update(chunk)
    time_ns = TIMES_FROM_NS + int.from_bytes(content.digest()[:8]) % TIMES_NS
    os.utime(target, ns=(time_ns, time_ns))


def _inside(path: str, entry: str, *, absolute: str | None = None) -> str:
    """`path` made plain and relative. Raises when it leads out of the context."""
    plain = posixpath.normpath(path)
    if posixpath.isabs(absolute if absolute is not None else path) or plain == ".." or plain.startswith("../"):
        raise InvalidRequest(f"the entry {entry!r} leads out of the context", field=FIELD)
    if "\0" in plain:
        raise InvalidRequest("an entry has a NUL in its name", field=FIELD)
    return "" if plain == "." else plain


def _plain_parents(folder: Path, target: Path, entry: str) -> None:
    """Make the parents of `target`; none may be a link, or the entry would land where the link leads."""
    here = folder
    for part in target.relative_to(folder).parts[:-1]:
        here = here / part
        if here.is_symlink():
            raise InvalidRequest(f"the entry {entry!r} goes through a link", field=FIELD)
        here.mkdir(exist_ok=True)
