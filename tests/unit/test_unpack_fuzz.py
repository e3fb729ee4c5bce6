"""Whatever bytes are called a layer: unpacking them ends, with `Refused` at worst, and touches nothing beside its root.

The helper's confinement needs a process of its own; here a child with the root as its working directory stands in for
many, and the archive's paths are the only thing that keeps it there (`chroot` where this runs as root).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pantala.images.inflate import Bounds, Inflate, Refused
from pantala.images.unpack import unpack
from pantala.testing import images as i

BOUNDS = Bounds(entries=50, bytes=1 << 20, ratio_from_bytes=1 << 16)
PACKS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, zstandard.compress]

PLAIN = "a a/b a/b/c /a ./a a//b b c ü . / .. ../x a/../../x a/.. dev/x"
WHITEOUTS = ".wh.a a/.wh.b a/.wh..wh..opq .wh..wh..opq .wh... .wh.. .wh."
names = st.sampled_from([*PLAIN.split(), *WHITEOUTS.split(), "", "\udcff", "x" * 300, "d/" * 300])
targets = st.sampled_from(["a", "b", "..", "../..", "/", "../canary", "/etc", "a/b", "", "c", "x" * 5000])
kinds = st.sampled_from([*(bytes([kind]) for kind in b"0123456"), b"7", b"V", b"S", b"x", b"g", b"L", b"K"])
owners = st.sampled_from([0, 1000, 65_535, 65_536, 2**31, 2**32 + 1])
numbers = st.sampled_from(["0", "-1", "nan", "inf", "1e400", "x", "9" * 30, ""])
headers = st.dictionaries(
    st.sampled_from(
        ["mtime", "uid", "size", "path", "linkpath", "GNU.sparse.map", "GNU.sparse.size", "SCHILY.xattr.user.a"]
    ),
    st.one_of(numbers, names, st.just("0,1,5")),
    max_size=2,
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for _ in range(draw(st.integers(0, 6))):
            content = draw(st.sampled_from([b"", b"x", b"1\n" * 600]))
            info, _ = i.entry(draw(names), draw(kinds), linkname=draw(targets), uid=draw(owners), gid=draw(owners))
            info.size, info.pax_headers = len(content), draw(headers)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@st.composite
def layers(draw: st.DrawFn) -> bytes:
    """An archive, packed, and perhaps damaged before or after."""
    data = draw(st.one_of(archives(), st.binary(max_size=2_000)))
    for pack in (True, False):
        if data and draw(st.booleans()):
            at = draw(st.integers(0, len(data) - 1))
            wrong = draw(st.sampled_from([b"", b"\xff", b"\0" * 4, b"9" * 8]))
            data = data[:at] + wrong + data[at + len(wrong) :] if wrong else data[:at]
        if pack:
            data = draw(st.sampled_from(PACKS))(data)
    return data


def in_child(root: Path, data: bytes) -> str:
    """What unpacking ends with: `ok`, `refused` or what it raised; in a child, whose root the folder is."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "died"
        try:
            os.chroot(root)
            os.chdir("/")
            unpack(io.BytesIO(data), BOUNDS)
            said = "ok"
        except Refused as refused:
            said = "refused" if str(refused) else "refused without a word"
        except BaseException as error:  # noqa: BLE001 - the child tells, whatever it is
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode("utf-8", "backslashreplace")[:1000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.mark.root
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layers())
def test_no_layer_leaves_its_root_or_raises_anything_else(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "canary").write_text("untouched")
        (base / "root").mkdir()
        assert in_child(base / "root", data) in ("ok", "refused")
        assert sorted(path.name for path in base.iterdir()) == ["canary", "root"]
        assert (base / "canary").read_text() == "untouched"
        assert (base / "canary").stat().st_nlink == 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3_000), st.sampled_from([b"", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]))
def test_every_stream_ends(data: bytes, magic: bytes) -> None:
    with contextlib.suppress(Refused, zstandard.ZstdError, zlib.error):
        Inflate(io.BytesIO(magic + data), BOUNDS).finish()


@given(st.binary(max_size=20_000), st.sampled_from(PACKS), st.integers(1, 4_096))
@settings(max_examples=100, deadline=None)
def test_what_was_packed_comes_out(data: bytes, pack: Callable[[bytes], bytes], step: int) -> None:
    magic = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zX", b"\x04\x22\x4d\x18")
    if pack is bytes and data.startswith(magic):
        data = b"." + data
    stream, parts = Inflate(io.BytesIO(pack(data)), Bounds()), list[bytes]()
    while part := stream.read(step):
        parts.append(part)
    assert b"".join(parts) == data
    assert stream.diff_id == i.digest_of(data)
