"""The build context: a directory as a gzip tar, without what `.dockerignore` names."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

from pantala.builds.ignore import IgnoreRules
from pantala.errors import InvalidRequest

FILES_MAX = 200_000
OUTSIDE_DOCKERFILE = ".pantala.Dockerfile"
"""Where a Dockerfile that lies outside the context travels."""


def pack(root: Path, destination: Path, *, dockerfile: Path, ignorefile: Path | None = None) -> str:
    """Write the context; the Dockerfile's path inside it. Raises InvalidRequest naming what is missing.

    Owners and times do not travel, so that the same source gives the same image; the platform makes times of its own.
    """
    if not dockerfile.is_file():
        raise InvalidRequest(f"there is no {dockerfile}", field="build.dockerfile")
    ignore = ignorefile or root / ".dockerignore"
    if ignorefile is not None and not ignorefile.is_file():
        raise InvalidRequest(f"there is no {ignorefile}", field="build.ignorefile")
    rules = IgnoreRules(ignore.read_text().splitlines() if ignore.is_file() else [])
    try:
        inside = dockerfile.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        inside = OUTSIDE_DOCKERFILE
    with tarfile.open(destination, "w:gz", compresslevel=3) as archive:
        for path in _walk(root, rules, always=inside):
            _add(archive, path, path.relative_to(root).as_posix())
        if inside == OUTSIDE_DOCKERFILE:
            _add(archive, dockerfile, inside)
    return inside


def _walk(root: Path, rules: IgnoreRules, *, always: str) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        below = here.relative_to(root)
        for name in sorted(folders):
            path = (below / name).as_posix()
            if rules.ignores(path) and not rules.has_exceptions and not always.startswith(f"{path}/"):
                folders.remove(name)
            elif not rules.ignores(path):
                found.append(here / name)
        folders.sort()
        found += [here / name for name in sorted(files) if _taken((below / name).as_posix(), rules, always)]
        if len(found) > FILES_MAX:
            raise InvalidRequest(f"{root} has more than {FILES_MAX} files", hint="use .dockerignore")
    return found


def _taken(path: str, rules: IgnoreRules, always: str) -> bool:
    return path == always or not rules.ignores(path)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    member = archive.gettarinfo(path, arcname=name)
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return  # sockets and devices of the working copy are no source
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    executable = member.mode & stat.S_IXUSR
    member.mode = 0o755 if member.isdir() or executable else 0o644
    member.mtime = 0
    if not member.isreg():
        archive.addfile(member)
        return
    with path.open("rb") as file:
        archive.addfile(member, file)
