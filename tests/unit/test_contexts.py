"""Build contexts are unpacked inside their folder or not at all."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pantala.control.contexts import Bounds, unpack
from pantala.errors import InvalidRequest


def entry(name: str, **changes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def archive(folder: Path, *members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> Path:
    path = folder / "context.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    return folder


def test_files_folders_and_links_inside_are_kept(tmp_path: Path, target: Path) -> None:
    made = archive(
        tmp_path,
        entry("app", type=tarfile.DIRTYPE, mode=0o755),
        (entry("app/run.sh", mode=0o4755), b"#!/bin/sh\n"),
        (entry("./app.py"), b"x = 1\n"),
        entry("app/link", type=tarfile.SYMTYPE, linkname="../app.py"),
        entry("hard.py", type=tarfile.LNKTYPE, linkname="app.py"),
    )
    unpack(made, target, Bounds())
    assert (target / "app.py").read_text() == "x = 1\n"
    assert (target / "hard.py").read_text() == "x = 1\n"
    assert (target / "app" / "link").resolve() == target / "app.py"
    assert (target / "app" / "run.sh").stat().st_mode & 0o7777 == 0o755


def test_a_files_time_follows_from_its_content_whatever_the_archive_says(tmp_path: Path) -> None:
    def time_ns(name: str, words: bytes, claimed: int) -> int:
        folder = tmp_path / name
        folder.mkdir()
        unpack(archive(tmp_path, (entry("app.py", mtime=claimed), words)), folder, Bounds())
        return (folder / "app.py").stat().st_mtime_ns

    first = time_ns("first", b"x = 1\n", 0)
    assert time_ns("again", b"x = 1\n", 1_000) == first, "the same source gives the same image"
    assert time_ns("edited", b"x = 2\n", 0) != first, "an edit of equal length is seen by the builder"


BAD: dict[str, Callable[[], tuple[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], ...]]] = {
    "dots": lambda: ((entry("../evil"), b"x"),),
    "absolute": lambda: ((entry("/etc/evil"), b"x"),),
    "dots-inside": lambda: ((entry("a/../../evil"), b"x"),),
    "link-out": lambda: (entry("out", type=tarfile.SYMTYPE, linkname="../../etc/passwd"),),
    "link-absolute": lambda: (entry("out", type=tarfile.SYMTYPE, linkname="/etc/passwd"),),
    "hard-link-out": lambda: (entry("out", type=tarfile.LNKTYPE, linkname="../evil"),),
    "through-link": lambda: (entry("d", type=tarfile.SYMTYPE, linkname="."), (entry("d/x"), b"x")),
    "device": lambda: (entry("dev", type=tarfile.CHRTYPE),),
    "fifo": lambda: (entry("pipe", type=tarfile.FIFOTYPE),),
}


@pytest.mark.parametrize("case", BAD)
def test_entries_that_leave_the_context_are_refused(case: str, tmp_path: Path, target: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        unpack(archive(tmp_path, *BAD[case]()), target, Bounds())
    assert refused.value.field == "context"
    assert not (tmp_path / "evil").exists()


def test_bounds_hold(tmp_path: Path, target: Path) -> None:
    bomb = archive(tmp_path, (entry("zeros"), bytes(100_000)))
    with pytest.raises(InvalidRequest, match="unpacks to more"):
        unpack(bomb, target, Bounds(unpacked_bytes=10_000))
    many = archive(tmp_path, *((entry(f"f{n}"), b"") for n in range(20)))
    with pytest.raises(InvalidRequest, match="unpacks to more"):
        unpack(many, target, Bounds(entries=10))


def test_what_is_not_a_tar_gz_is_refused(tmp_path: Path, target: Path) -> None:
    path = tmp_path / "context.tar.gz"
    path.write_bytes(b"not an archive")
    with pytest.raises(InvalidRequest, match=r"complete tar\.gz"):
        unpack(path, target, Bounds())
    path.write_bytes(archive(tmp_path, (entry("f"), bytes(range(256)) * 40)).read_bytes()[:-40])
    with pytest.raises(InvalidRequest):
        unpack(path, target, Bounds())
