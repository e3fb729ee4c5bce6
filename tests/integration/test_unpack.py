"""Layers become directories, faithfully and never outside them. The helper runs as the store runs it."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from pantala.images.unpack import Bounds

pytestmark = pytest.mark.root

CAPABILITY = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
"""cap_net_bind_service=ep"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The destination, beside files that must stay as they are."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "kept").write_text("untouched")
    (tmp_path / "root").mkdir(mode=0o755)
    yield tmp_path / "root"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "root"]
    assert (tmp_path / "beside" / "kept").read_text() == "untouched"
    assert (tmp_path / "beside" / "kept").stat().st_nlink == 1


def layer(*entries: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info, content = entry if isinstance(entry, tuple) else (entry, b"")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in more.items():
        setattr(info, key, value)
    return info


def text(name: str, content: str = "hello", **more: int) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, tarfile.REGTYPE, **more), content.encode()


def run(root: Path, data: bytes, bounds: Bounds | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pantala.images.unpack", str(root)]
    if bounds is not None:
        script = (
            "import sys; from pathlib import Path; from pantala.images.unpack import *\n"
            f"confine(Path(sys.argv[1]))\n"
            f"try: unpack(sys.stdin.buffer, Bounds(entries={bounds.entries}, bytes={bounds.bytes}))\n"
            "except Refused as refused: sys.exit(str(refused))"
        )
        command = [sys.executable, "-c", script, str(root)]
    return subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)


def unpacked(root: Path, data: bytes) -> None:
    done = run(root, data)
    assert (done.returncode, done.stderr) == (0, b"")


def refusal(root: Path, data: bytes) -> str:
    done = run(root, data)
    assert done.returncode == 2, done.stderr.decode()
    sentence = done.stderr.decode().strip()
    assert sentence
    assert "\n" not in sentence, sentence
    return sentence


def test_owners_modes_times_and_kinds_are_kept(root: Path) -> None:
    unpacked(
        root,
        layer(
            entry("usr", tarfile.DIRTYPE, mode=0o1777, uid=3, gid=4, mtime=1_000),
            text("usr/tool", "binary", mode=0o4755, uid=7, gid=8, mtime=2_000),
            entry("usr/link", tarfile.SYMTYPE, linkname="/etc/shadow", uid=9, gid=9),
            entry("usr/same", tarfile.LNKTYPE, linkname="usr/tool"),
            entry("usr/pipe", tarfile.FIFOTYPE),
            text("deep/without/parents", "x"),
            text("./dotted", "y"),
            text("/absolute", "z"),
        ),
    )
    folder, tool, link = root / "usr", root / "usr/tool", root / "usr/link"
    found = folder.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime) == (0o1777, 3, 4, 1_000)
    found = tool.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime) == (0o4755, 7, 8, 2_000)
    assert (root / "usr/same").samefile(tool)
    assert link.readlink() == Path("/etc/shadow")
    assert link.lstat().st_uid == 9
    assert stat.S_ISFIFO((root / "usr/pipe").stat().st_mode)
    assert [(root / name).read_text() for name in ("deep/without/parents", "dotted", "absolute")] == ["x", "y", "z"]


def test_whiteouts_are_those_of_overlayfs(root: Path) -> None:
    unpacked(
        root,
        layer(
            entry("etc", tarfile.DIRTYPE), text("etc/.wh.gone", ""), text("opt/.wh..wh..opq", ""), text(".wh.top", "")
        ),
    )
    for name in ("etc/gone", "top"):
        found = (root / name).lstat()
        assert stat.S_ISCHR(found.st_mode)
        assert found.st_rdev == os.makedev(0, 0)
    assert os.getxattr(root / "opt", "trusted.overlay.opaque") == b"y"
    assert list((root / "opt").iterdir()) == []


def test_attributes_are_kept_but_none_that_steers_overlayfs(root: Path) -> None:
    attributes = {
        "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.user.note": "kept",
        "SCHILY.xattr.user.overlay.redirect": "/etc",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
    }
    unpacked(root, layer((entry("tool", pax_headers=attributes), b"x"), entry("pipe", tarfile.FIFOTYPE)))
    assert os.getxattr(root / "tool", "security.capability") == CAPABILITY
    assert os.getxattr(root / "tool", "user.note") == b"kept"
    assert sorted(os.listxattr(root / "tool")) == ["security.capability", "user.note"]


def test_later_entries_replace_earlier_ones(root: Path) -> None:
    unpacked(
        root,
        layer(
            text("a/file", "old"),
            text("a/file", "new"),
            entry("b", tarfile.DIRTYPE),
            text("b/inside", "x"),
            text("b", "a file now"),
            entry("c", tarfile.SYMTYPE, linkname="a"),
            entry("c", tarfile.DIRTYPE),
        ),
    )
    assert (root / "a/file").read_text() == "new"
    assert (root / "b").read_text() == "a file now"
    assert (root / "c").is_dir()
    assert not (root / "c").is_symlink()


def members(data: bytes) -> bytes:
    return gzip.compress(data[:700]) + gzip.compress(data[700:])


def frames(data: bytes) -> bytes:
    return zstandard.compress(data[:700]) + zstandard.compress(data[700:])


@pytest.mark.parametrize("pack", [bytes, gzip.compress, members, zstandard.compress, frames])
def test_every_compression_is_told_apart(root: Path, pack: Callable[[bytes], bytes]) -> None:
    content = "0123456789" * 400_000
    unpacked(root, pack(layer(text("file", content), text("after"))))
    assert (root / "file").read_text() == content
    assert (root / "after").read_text() == "hello"


def test_a_symlink_to_the_root_leads_no_further_than_the_destination(root: Path) -> None:
    beside = root.parent / "beside"
    unpacked(
        root,
        layer(
            entry("out", tarfile.SYMTYPE, linkname="/"),
            entry("up", tarfile.SYMTYPE, linkname="../../../../.."),
            text(f"out{beside}/kept", "changed"),
            text(f"up{beside}/new", "made"),
            text(f"out{beside}/.wh.kept", ""),
        ),
    )
    assert (root / beside.relative_to("/") / "new").read_text() == "made"  # below the destination


def test_a_hard_link_through_a_symlink_does_not_reach_the_host(root: Path) -> None:
    kept = root.parent / "beside" / "kept"
    data = layer(entry("out", tarfile.SYMTYPE, linkname="/"), entry("stolen", tarfile.LNKTYPE, linkname=f"out{kept}"))
    assert "is not there" in refusal(root, data)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([text("../escape")], "'../escape' points out of the image"),
        ([text("a/../../escape")], "points out of the image"),
        ([text("a/.wh...")], "points out of the image"),
        ([entry("a", tarfile.LNKTYPE, linkname="../beside/kept")], "points out of the image"),
        ([entry("a", tarfile.LNKTYPE, linkname="nowhere")], "'nowhere', which is not there"),
        ([entry("disk", tarfile.BLKTYPE, devmajor=8)], "'disk' is a device"),
        ([entry("etc/zero", tarfile.CHRTYPE, devmajor=1, devminor=5)], "'etc/zero' is a device"),
        ([text("file"), text("file/below")], "'file' is used as a directory"),
        ([text("n" * 300)], "cannot be made"),
        ([text("d/" * 2_500 + "f")], "too long"),
        ([entry("a", pax_headers={"mtime": "nan"})], "not a readable layer"),
        ([entry("a", pax_headers={"uid": str(2**80)})], "not a readable layer"),
    ],
)
def test_refused_with_a_sentence(
    root: Path, entries: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]], said: str
) -> None:
    assert said in refusal(root, layer(*entries))


def test_devices_below_dev_are_left_out(root: Path) -> None:
    unpacked(root, layer(entry("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3), text("after")))
    assert not (root / "dev/null").exists()
    assert (root / "after").exists()


TWO = layer(text("one", "1" * 5_000), text("two", "2" * 5_000))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a layer at all",
        TWO[:3_000],
        TWO[: 512 + 5_120 + 100],
        TWO[: 512 + 5_120] + b"\xff" * 512 + TWO[512 + 5_120 + 512 :],
        gzip.compress(TWO)[:-30],
        gzip.compress(TWO)[:20] + b"\x00" * 40,
        zstandard.compress(TWO)[:-5],
    ],
    ids=["empty", "text", "content", "header", "damaged header", "gzip cut", "gzip damaged", "zstd cut"],
)
def test_broken_data_is_refused(root: Path, data: bytes) -> None:
    refusal(root, data)


def test_bounds(root: Path) -> None:
    small = Bounds(entries=3, bytes=64 * 1024)
    assert run(root, layer(*(text(f"f{number}") for number in range(3))), small).returncode == 0
    many = run(root, layer(*(text(f"g{number}") for number in range(4))), small)
    assert many.stderr.decode().strip() == "it holds more than 3 entries"
    for pack in (gzip.compress, zstandard.compress):
        large = run(root, pack(layer(text("large", "0" * 100_000))), small)
        assert large.stderr.decode().strip() == "it unpacks to more than 65536 bytes"
    assert not (root / "large").exists()


def test_holes_count_as_what_they_claim(root: Path) -> None:
    """A sparse file of a terabyte takes a few bytes in the archive."""
    info = entry("hole", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)})
    assert "unpacks to more than" in refusal(root, layer((info, b"x")))


def test_a_header_of_gigabytes_does_not_take_the_hosts_memory(root: Path) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 7 * 1024**3
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert "layer" in refusal(root, gzip.compress(header + b"\0" * 64 * 1024))
