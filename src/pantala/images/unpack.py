"""The confined helper that turns one layer into a directory: `python -m pantala.images.unpack DIR < layer`.

It runs as its own process: before it reads a byte it enters new mount, network and IPC namespaces, makes the
destination its root directory and drops every capability but those for owners, modes and file capabilities. So a path
or link that means to leave the tree has nowhere to go; such entries are refused by name all the same. Exit code 0; 2
with one sentence on stderr for the image's owner; 4 when the disk has no room; 3 for other trouble of the host.

Whiteouts become overlayfs's own (a 0/0 character device, an opaque attribute).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import stat
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from pantala.kit.disk import check_reserve, is_full

NAME_BYTES_MAX = 4096
MEMORY_BYTES_MAX = 2 * 1024**3
"""Address space of the helper: a header that claims gigabytes of names ends it, not the host."""

ZSTD_STEP_BYTES = 1024
"""Fed to zstd at once: it cannot be told how much to give back, and a byte may become 32 KiB."""

NOT_OF_THE_HOST = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL})
"""Errors that this layer would meet on every host."""

_ROOT = Path("/")
_CLONE_NEWNS, _CLONE_NEWNET, _CLONE_NEWIPC = 0x00020000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 1, 38, 24
_CAP_VERSION_3 = 0x20080522
_KEPT_CAPABILITIES = (0, 1, 3, 4, 21, 27, 31)
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN (trusted.* attributes), MKNOD (whiteouts), SETFCAP."""


class Refused(Exception):
    """This layer must not be unpacked; the text is for the image's owner."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """`bytes` counts the plain tar, and apart from it what the files claim to hold (holes are cheap to write down)."""

    entries: int = 500_000
    bytes: int = 8 * 1024**3


DEFAULT_BOUNDS = Bounds()


def confine(root: Path) -> None:
    """Make `root` all there is for this process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")

    call("unshare", _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC)
    os.chroot(root)
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    for capability in range(64):
        if capability not in _KEPT_CAPABILITIES:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    mask = sum(1 << capability for capability in _KEPT_CAPABILITIES)
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    call("capset", ctypes.byref(header), ctypes.byref(data))
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody waits for what an ended agent began


class _Inflate:
    """A plain stream out of gzip (several members), zstd or no compression, told apart by the first bytes."""

    def __init__(self, source: IO[bytes], bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._chunks = self._open(source)
        self._buffer = b""
        self._given = 0

    def _open(self, source: IO[bytes]) -> Iterator[bytes]:
        head = source.read(4)
        if head[:2] == b"\x1f\x8b":
            return self._gunzip(head, source)
        if head == b"\x28\xb5\x2f\xfd":
            return self._unzstd(head, source)
        return self._plain(head, source)

    @staticmethod
    def _plain(head: bytes, source: IO[bytes]) -> Iterator[bytes]:
        yield head
        while chunk := source.read(1 << 20):
            yield chunk

    @staticmethod
    def _gunzip(head: bytes, source: IO[bytes]) -> Iterator[bytes]:
        inflater, data = zlib.decompressobj(31), head
        while True:
            yield inflater.decompress(data, 1 << 20)
            data = inflater.unconsumed_tail
            if inflater.eof:
                data = inflater.unused_data or source.read(1 << 16)
                if not data:
                    return
                inflater = zlib.decompressobj(31)
            elif not data:
                data = source.read(1 << 16)
                if not data:
                    raise Refused("the layer ends in the middle of its compressed data")

    @staticmethod
    def _unzstd(head: bytes, source: IO[bytes]) -> Iterator[bytes]:
        frames = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        inflater, data = frames.decompressobj(), head
        while True:
            yield inflater.decompress(data)
            data = inflater.unused_data if inflater.eof else b""
            data = data or source.read(ZSTD_STEP_BYTES)
            if not data:
                if not inflater.eof:
                    raise Refused("the layer ends in the middle of its compressed data")
                return
            if inflater.eof:
                inflater = frames.decompressobj()

    def read(self, size: int) -> bytes:
        parts, missing = [self._buffer], size - len(self._buffer)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            parts.append(chunk)
            missing -= len(chunk)
        data = b"".join(parts)
        self._buffer = data[size:]
        self._given += min(size, len(data))
        if self._given > self._bytes_max:
            raise _too_large(self._bytes_max)
        return data[:size]


def _too_large(bytes_max: int) -> Refused:
    return Refused(f"it unpacks to more than {bytes_max} bytes")


class _Header(tarfile.TarInfo):
    """A header that breaks off or makes no sense is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except (_InvalidHeader, _TruncatedHeader) as error:
            raise Refused(f"it is not a readable layer: {error}") from error


_InvalidHeader: type[Exception] = tarfile.InvalidHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_TruncatedHeader: type[Exception] = tarfile.TruncatedHeaderError  # pyright: ignore[reportAttributeAccessIssue]


def unpack(source: IO[bytes], bounds: Bounds = DEFAULT_BOUNDS) -> None:
    """Unpack a layer into the working directory, which must be the root (`confine`). Raises Refused."""
    times: list[tuple[str, float]] = []
    entries = claimed = 0
    stream = cast("IO[bytes]", _Inflate(source, bounds.bytes))
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                cast("Any", archive).members.clear()  # it would keep all of them
                entries += 1
                claimed += member.size
                if entries > bounds.entries:
                    raise Refused(f"it holds more than {bounds.entries} entries")
                if claimed > bounds.bytes:
                    raise _too_large(bounds.bytes)
                if path := _safe(member.name):
                    _entry(archive, member, path)
                    if member.isdir():
                        times.append((path, member.mtime))
        for path, modified in reversed(times):
            if os.path.isdir(path) and not os.path.islink(path):  # noqa: PTH112, PTH114 - bytes of a foreign tree
                os.utime(path, (modified, modified))
    except _UNREADABLE as error:
        raise Refused(f"it is not a readable layer: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno in NOT_OF_THE_HOST:
            raise Refused(f"{error.filename!r} cannot be made: {error.strerror}") from error
        raise


_UNREADABLE = (
    tarfile.TarError,
    zlib.error,
    zstandard.ZstdError,
    EOFError,
    MemoryError,
    OverflowError,
    RecursionError,
    ValueError,
)
"""What a broken or malicious archive makes the readers raise: a time that is no number, an endless chain of headers."""


def _safe(name: str) -> str:
    """The path below the root, without a leading slash; empty for the root itself."""
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
        raise Refused("it holds a path that is too long")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused(f"the path {name!r} points out of the image")
    return "/".join(parts)


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    parent, _, base = path.rpartition("/")
    _make_parents(parent)
    if base == ".wh..wh..opq":
        _opaque(parent or ".")
        return
    if base.startswith(".wh."):
        if base[4:] in ("", ".", ".."):
            raise Refused(f"the path {member.name!r} points out of the image")
        target = f"{parent}/{base[4:]}" if parent else base[4:]
        _remove(target)
        os.mknod(target, stat.S_IFCHR | 0o000, os.makedev(0, 0))
        return
    if member.isdir():
        if not (os.path.isdir(path) and not os.path.islink(path)):  # noqa: PTH112, PTH114 - bytes of a foreign tree
            _remove(path)
            os.mkdir(path)  # noqa: PTH102
    elif member.isreg():
        _remove(path)
        _write(archive, member, path)
    elif member.issym():
        _remove(path)
        os.symlink(member.linkname, path)  # noqa: PTH211
    elif member.islnk():
        target = _safe(member.linkname)
        _remove(path)
        try:
            os.link(target, path, follow_symlinks=False)
        except OSError as error:
            raise Refused(f"the hard link {member.name!r} leads to {member.linkname!r}, which is not there") from error
        return
    elif member.isfifo():
        _remove(path)
        os.mkfifo(path)
    elif path.startswith("dev/"):
        return  # the machine's own /dev is mounted over it
    else:
        raise Refused(f"{member.name!r} is a device")
    _attributes(member, path)


def _make_parents(parent: str) -> None:
    built = ""
    for part in parent.split("/") if parent else ():
        built = f"{built}/{part}" if built else part
        try:
            os.mkdir(built, 0o755)  # noqa: PTH102
        except FileExistsError:
            if not os.path.isdir(built):  # noqa: PTH112
                raise Refused(f"{built!r} is used as a directory but is none") from None


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    content = archive.extractfile(member)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while content is not None and (chunk := content.read(1 << 20)):
            file.write(chunk)
            check_reserve(_ROOT)


def _attributes(member: tarfile.TarInfo, path: str) -> None:
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if member.issym():
        return
    os.chmod(path, member.mode & 0o7777)  # noqa: PTH101
    for name, value in member.pax_headers.items():
        if name.startswith("SCHILY.xattr."):
            attribute = name.removeprefix("SCHILY.xattr.")
            if _may_carry(member, attribute):
                os.setxattr(path, attribute, value.encode("utf-8", "surrogateescape"))
    if not member.isdir():
        os.utime(path, (member.mtime, member.mtime))


def _may_carry(member: tarfile.TarInfo, attribute: str) -> bool:
    """Capabilities and attributes of users; never those by which overlayfs is steered (`user.overlay.redirect`)."""
    if attribute == "security.capability":
        return member.isreg()
    of_user = attribute.startswith("user.") and not attribute.startswith("user.overlay.")
    return of_user and (member.isreg() or member.isdir())


def _opaque(path: str) -> None:
    os.setxattr(path, "trusted.overlay.opaque", b"y")
    os.setxattr(path, "user.overlay.opaque", b"y")


def _remove(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(path)  # noqa: PTH108
        return
    for folder, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(f"{folder}/{name}")  # noqa: PTH108
        for name in folders:
            below = f"{folder}/{name}"
            os.unlink(below) if os.path.islink(below) else os.rmdir(below)  # noqa: PTH106, PTH108, PTH114
    os.rmdir(path)  # noqa: PTH106


def main(arguments: list[str]) -> int:
    os.umask(0)
    try:
        confine(Path(arguments[0]))
        unpack(sys.stdin.buffer)
    except Refused as refused:
        sys.stderr.write(f"{refused}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        return 4 if is_full(error, _ROOT) else 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
