"""Layers that leave out their directories, fitted to the layers below them.

An archive may name `lib/tool` and no `lib`. On its own such a layer has a plain directory there, which as part of an
overlay would hide what is below: the owner and mode of a directory, or a link (`lib -> usr/lib`) through which the file
was meant to go. So where the layers below have either, the layer is used as a copy (its files are links to the same
content) that has the directory's own attributes, or the content where the link leads. The directories are known from
the helper that unpacked the layer (`unpack.Facts`).

Nothing is followed on the way but by these functions: what layers hold is foreign, and a link in it means a path of
the machine, never of the host.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

LINKS_MAX = 40
_OPAQUE = "trusted.overlay.opaque"
_AS_MADE = (0o755, 0, 0)
_NOT_POSSIBLE = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY})


class Fit(msgspec.Struct, frozen=True):
    """One directory of a layer: where its content belongs, and how the directory there looks below."""

    path: str
    goes_to: str
    mode: int
    uid: int
    gid: int


def plan(lower: Sequence[Path], implicit: Sequence[str]) -> list[Fit]:
    """What has to be changed in a layer with these directories over `lower` (the lowest first); parents first."""
    fits: list[Fit] = []
    for path in sorted(implicit, key=lambda path: (path.count("/"), path)):
        with contextlib.suppress(OSError):
            real, found = _resolve(lower, path)
            if not real or (found is not None and not stat.S_ISDIR(found.st_mode)):
                continue
            mode, uid, gid = (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) if found else _AS_MADE
            if real != path or (mode, uid, gid) != _AS_MADE:
                fits.append(Fit(path=path, goes_to=real, mode=mode, uid=uid, gid=gid))
    return fits


def name(layer: str, fits: list[Fit]) -> str:
    """The digest that names a layer so changed."""
    text = json.dumps([1, layer, [msgspec.structs.astuple(fit) for fit in fits]])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def apply(tree: Path, fits: list[Fit]) -> None:
    """Change a copy of the layer. What the layer itself makes impossible stays as it is."""
    for fit in reversed(fits):  # what is deeper leaves before its parent does
        try:
            _apply(tree, fit)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise


def _apply(tree: Path, fit: Fit) -> None:
    source = tree / fit.path
    if not _is_folder(tree, fit.path) or _is_opaque(source):
        return
    if fit.path == fit.goes_to:
        os.chown(source, fit.uid, fit.gid)
        source.chmod(fit.mode)
        return
    built = ""
    for part in fit.goes_to.split("/"):
        built = f"{built}/{part}" if built else part
        if not os.path.lexists(tree / built):
            (tree / built).mkdir(0o755)
            if built == fit.goes_to:
                os.chown(tree / built, fit.uid, fit.gid)
                (tree / built).chmod(fit.mode)
        elif not _is_folder(tree, built):
            return
    _merge(source, tree / fit.goes_to)
    source.rmdir()


def _merge(source: Path, target: Path) -> None:
    for old in sorted(source.iterdir()):
        new = target / old.name
        if old.is_dir() and not old.is_symlink() and new.is_dir() and not new.is_symlink():
            _merge(old, new)
            old.rmdir()
        else:
            old.rename(new)


def _resolve(lower: Sequence[Path], path: str) -> tuple[str, os.stat_result | None]:
    """Where `path` leads in the union, through links to what is not there too, and what is there."""
    waiting, real, links = path.split("/"), "", 0
    found: os.stat_result | None = None
    while waiting:
        part = waiting.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            real = real.rpartition("/")[0]
            continue
        real, parent = (f"{real}/{part}" if real else part), real
        seen = _look(lower, real)
        found = seen[0] if seen else None
        if seen and stat.S_ISLNK(seen[0].st_mode):
            if (links := links + 1) > LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            leads = str((seen[1] / real).readlink())
            real = "" if leads.startswith("/") else parent
            waiting = leads.split("/") + waiting
        elif found and waiting and not stat.S_ISDIR(found.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return real, found


def _look(lower: Sequence[Path], path: str) -> tuple[os.stat_result, Path] | None:
    """What the union shows at `path`, whose parents are directories of the union."""
    for layer in reversed(lower):
        at, parts = "", path.split("/")
        hides = False
        for index, part in enumerate(parts):
            at = f"{at}/{part}" if at else part
            try:
                found = os.lstat(layer / at)
            except (FileNotFoundError, NotADirectoryError):
                break
            if stat.S_ISCHR(found.st_mode):
                return None
            if index == len(parts) - 1:
                return found, layer
            if not stat.S_ISDIR(found.st_mode):
                return None  # it hides the directory that lower layers have here
            hides = hides or _is_opaque(layer / at)
        if hides:
            return None
    return None


def _is_folder(tree: Path, path: str) -> bool:
    """Whether all of `path` is real directories: a link on the way could lead to the host's."""
    at = tree
    for part in path.split("/"):
        at = at / part
        try:
            if not stat.S_ISDIR(os.lstat(at).st_mode):
                return False
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def _is_opaque(folder: Path) -> bool:
    try:
        return os.getxattr(folder, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False
