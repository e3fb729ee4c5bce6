"""The confined helper that turns one layer into a directory: `python -m pantala.images.unpack DIR [BOUNDS] < layer`.

It runs as its own process: before it reads a byte it enters new mount, network and IPC namespaces, makes the
destination its root directory and drops every capability but those for owners, modes and file capabilities. So a path
or link that means to leave the tree has nowhere to go; such entries are refused by name all the same. Exit code 0, with
what the store must know of the layer (`Facts`, as JSON) on stdout; 2 with one sentence on stderr for the image's owner;
4 when the disk has no room; 3 for other trouble of the host.

Whiteouts become overlayfs's own (a 0/0 character device, an opaque attribute).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import stat
import sys
import tarfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from pantala.images.inflate import DEFAULT_BOUNDS, Bounds, Inflate, Refused, too_large
from pantala.kit.disk import check_reserve, has_room, is_full

NAME_BYTES_MAX = 4096
DEPTH_MAX = 255
HEADER_BYTES_MAX = 1 << 20
"""A long name or the attributes of one entry; tarfile reads them into memory."""

SAID_CHARS_MAX = 1000
IMPLICIT_BYTES_MAX = 16 * 1024**2
MEMORY_BYTES_MAX = 2 * 1024**3
"""Address space of the helper: an archive that wants more ends it, not the host."""

ID_MAX = 65_535
NOBODY = 65_534
"""Ids inside a machine end at `ID_MAX`. What belongs to a higher one would be nobody's there, and could not be written:
so it is given to nobody here."""

OF_THE_HOST = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,
        errno.EINTR, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.ENODEV, errno.ESTALE, errno.EPIPE,
    }
)  # fmt: skip
"""Errors that another host, or the same one later, may not meet. All others are this layer's own."""

_ROOT = Path("/")
_OPAQUE, _WHITEOUT, _OF_AUFS = ".wh..wh..opq", ".wh.", ".wh..wh."
_HEADERS_OF_TEXT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K")
_CLONE_NEWNS, _CLONE_NEWNET, _CLONE_NEWIPC = 0x00020000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 1, 38, 24
_CAP_VERSION_3 = 0x20080522
_KEPT_CAPABILITIES = (0, 1, 3, 4, 21, 27, 31)
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN (trusted.* attributes), MKNOD (whiteouts), SETFCAP."""


@dataclass(kw_only=True)
class Facts:
    """What a layer's directory does not show. `implicit`: directories that no entry names, only paths below them;
    `opaque_root`: nothing of lower layers is left."""

    diff_id: str = ""
    bytes: int = 0
    entries: int = 0
    implicit: list[str] = field(default_factory=list[str])
    opaque_root: bool = False


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


class _Header(tarfile.TarInfo):
    """A header that breaks off or makes no sense is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except (_InvalidHeader, _TruncatedHeader) as error:
            raise Refused(f"it is not a readable layer: {error}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        made = super().frombuf(buf, encoding, errors)
        if made.type in _HEADERS_OF_TEXT and not 0 <= made.size <= HEADER_BYTES_MAX:
            raise Refused(f"it holds a header of {made.size} bytes; a layer's have at most {HEADER_BYTES_MAX}")
        return made


_InvalidHeader: type[Exception] = tarfile.InvalidHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_TruncatedHeader: type[Exception] = tarfile.TruncatedHeaderError  # pyright: ignore[reportAttributeAccessIssue]

_UNREADABLE = (
    tarfile.TarError,
    zlib.error,
    zstandard.ZstdError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a broken or malicious archive makes the readers raise: a time that is no number, an endless chain of headers,
a sparse map that leads nowhere."""


def unpack(source: IO[bytes], bounds: Bounds = DEFAULT_BOUNDS) -> Facts:
    """Unpack a layer into the working directory, which must be the root (`confine`).

    Raises Refused; OSError for trouble of the host."""
    try:
        return _Layer(Inflate(source, bounds), bounds).unpack()
    except _UNREADABLE as error:
        raise Refused(f"it is not a readable layer: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno not in OF_THE_HOST:
            raise Refused(f"{error.filename!r} cannot be made: {error.strerror}") from error
        raise


class _Layer:
    """One archive on its way to the disk."""

    def __init__(self, stream: Inflate, bounds: Bounds) -> None:
        self._stream = stream
        self._bounds = bounds
        self._facts = Facts()
        self._implicit: dict[str, None] = {}
        self._implicit_bytes = 0

    def unpack(self) -> Facts:
        times: list[tuple[str, float]] = []
        claimed = 0
        with tarfile.open(fileobj=cast("IO[bytes]", self._stream), mode="r|", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                cast("Any", archive).members.clear()  # it would keep all of them
                self._count()
                if member.size < 0:
                    raise Refused(f"{member.name!r} claims to hold {member.size} bytes")
                claimed += member.size
                if claimed > self._bounds.bytes:
                    raise too_large(self._bounds.bytes)
                if path := _safe(member.name):
                    self._entry(archive, member, path)
                    if member.isdir():
                        times.append((path, member.mtime))
        self._stream.finish()
        for path, modified in reversed(times):
            if _is_folder(path):
                os.utime(path, (modified, modified))
        self._facts.implicit = [path for path in self._implicit if _is_folder(path)]
        self._facts.diff_id, self._facts.bytes = self._stream.diff_id, self._stream.given
        return self._facts

    def _count(self) -> None:
        self._facts.entries += 1
        if self._facts.entries > self._bounds.entries:
            raise Refused(f"it holds more than {self._bounds.entries} entries")

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        parent, _, base = path.rpartition("/")
        if (base.startswith(_OF_AUFS) and base != _OPAQUE) or f"/{_OF_AUFS}" in f"/{parent}":
            return  # notes that aufs kept beside the files, no files
        self._make_parents(parent)
        if base == _OPAQUE:
            self._hide_below(parent)
        elif base.startswith(_WHITEOUT):
            self._hide(member, parent, base.removeprefix(_WHITEOUT))
        elif member.isdir():
            self._make_folder(path)
            _attributes(member, path)
        elif member.isreg():
            _remove(path)
            _write(archive, member, path)
            _attributes(member, path)
        elif member.issym():
            _remove(path)
            os.symlink(member.linkname, path)  # noqa: PTH211 - bytes of a foreign tree, here and below
            _attributes(member, path)
        elif member.islnk():
            _link(member, path)
        elif member.isfifo():
            _remove(path)
            os.mkfifo(path)
            _attributes(member, path)
        elif not member.isdev():
            raise Refused(f"{member.name!r} is of the kind {member.type!r}, which layers do not have")
        elif not path.startswith("dev/"):  # what is there is covered by the machine's own /dev
            raise Refused(f"{member.name!r} is a device; machines have those of their own /dev and no others")

    def _make_parents(self, parent: str) -> None:
        built, real = "", ""
        for part in parent.split("/") if parent else ():
            built = f"{built}/{part}" if built else part
            try:
                os.mkdir(built, 0o755)  # noqa: PTH102
            except FileExistsError:
                if _is_whiteout(built):
                    self._make_folder(built)
                elif os.path.isdir(built):  # noqa: PTH112
                    continue
                else:
                    raise Refused(f"{built!r} is used as a directory but is none") from None
            # Below a directory that was just made there are no links to follow.
            real = f"{real}/{part}" if real else os.path.realpath(built).lstrip("/")
            self._count()
            self._implicit[real] = None
            self._implicit_bytes += len(real)
            if self._implicit_bytes > IMPLICIT_BYTES_MAX:
                raise Refused("it leaves out too many of its directories")

    def _make_folder(self, path: str) -> None:
        """A directory that a whiteout of the same layer has made way for does not show what was there."""
        if self._implicit:
            self._implicit.pop(os.path.realpath(path).lstrip("/"), None)
        if _is_folder(path):
            return
        hides = _is_whiteout(path)
        _remove(path)
        os.mkdir(path, 0o755)  # noqa: PTH102
        if hides:
            _make_opaque(path)

    def _hide_below(self, folder: str) -> None:
        if not folder or os.path.realpath(folder) == "/":
            self._facts.opaque_root = True
        else:
            _make_opaque(folder)

    def _hide(self, member: tarfile.TarInfo, parent: str, name: str) -> None:
        """Only what lower layers have: files of the same layer stay, wherever in the archive they are."""
        if name in ("", ".", ".."):
            raise Refused(f"the path {member.name!r} points out of the image")
        path = f"{parent}/{name}" if parent else name
        if _is_folder(path):
            _make_opaque(path)
        elif not os.path.lexists(path):
            os.mknod(path, stat.S_IFCHR | 0o000, os.makedev(0, 0))


def _safe(name: str) -> str:
    """The path below the root, without a leading slash; empty for the root itself."""
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
        raise Refused("it holds a path that is too long")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if len(parts) > DEPTH_MAX:
        raise Refused(f"it holds a path of more than {DEPTH_MAX} directories")
    if ".." in parts:
        raise Refused(f"the path {name!r} points out of the image")
    return "/".join(parts)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    content = archive.extractfile(member)
    has_holes = member.issparse()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while content is not None and (chunk := content.read(1 << 20)):
            if has_holes and not any(chunk):
                file.seek(len(chunk), os.SEEK_CUR)
                file.truncate()
                continue
            file.write(chunk)
            check_reserve(_ROOT)


def _link(member: tarfile.TarInfo, path: str) -> None:
    target = _safe(member.linkname)
    if target == path:
        return
    if _is_folder(target):
        raise Refused(f"the hard link {member.name!r} leads to {member.linkname!r}, which is a directory")
    if not os.path.lexists(target) or _is_whiteout(target):
        raise Refused(f"the hard link {member.name!r} leads to {member.linkname!r}, which is not there in its layer")
    if os.path.lexists(path) and os.path.samestat(os.lstat(path), os.lstat(target)):
        return
    _remove(path)
    try:
        os.link(target, path, follow_symlinks=False)
    except FileNotFoundError as error:  # it was below what made way
        raise Refused(f"the hard link {member.name!r} replaces {member.linkname!r}, to which it leads") from error


def _attributes(member: tarfile.TarInfo, path: str) -> None:
    os.chown(path, _inside(member.uid), _inside(member.gid), follow_symlinks=False)
    if member.issym():
        return
    os.chmod(path, member.mode & 0o7777)  # noqa: PTH101
    for name, value in member.pax_headers.items():
        if name.startswith("SCHILY.xattr."):
            attribute = name.removeprefix("SCHILY.xattr.")
            if _may_carry(member, attribute):
                _set_attribute(path, attribute, value.encode("utf-8", "surrogateescape"))
    if not member.isdir():
        os.utime(path, (member.mtime, member.mtime))


def _inside(owner: int) -> int:
    if not 0 <= owner < 2**32:
        raise ValueError(f"{owner} is no user or group")
    return owner if owner <= ID_MAX else NOBODY


def _may_carry(member: tarfile.TarInfo, attribute: str) -> bool:
    """Capabilities and attributes of users; never those by which overlayfs is steered (`user.overlay.redirect`)."""
    if attribute == "security.capability":
        return member.isreg()
    of_user = attribute.startswith("user.") and not attribute.startswith("user.overlay.")
    return of_user and (member.isreg() or member.isdir())


def _set_attribute(path: str, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        # An attribute that no file system has room for looks like a full disk.
        if error.errno in OF_THE_HOST and not (error.errno == errno.ENOSPC and has_room(_ROOT)):
            raise
        raise Refused(f"the attribute {name!r} of {path!r} cannot be kept: {error.strerror}") from error


def _make_opaque(path: str) -> None:
    os.setxattr(path, "trusted.overlay.opaque", b"y")
    os.setxattr(path, "user.overlay.opaque", b"y")


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114


def _is_whiteout(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.lstat(path).st_mode)  # no other device is ever made
    except OSError:
        return False


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
        bounds = Bounds(**json.loads(arguments[1])) if len(arguments) > 1 else DEFAULT_BOUNDS
        confine(Path(arguments[0]))
        facts = unpack(sys.stdin.buffer, bounds)
        sys.stdout.write(json.dumps(asdict(facts)))
        sys.stdout.flush()
    except Refused as refused:
        sentence = " ".join(str(refused).split())
        sys.stderr.write(f"{sentence[:SAID_CHARS_MAX]}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        return 4 if is_full(error, _ROOT) else 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
