"""The plain tar stream out of a layer's compressed bytes, for the helper that unpacks it (`unpack.py`).

Knows gzip (several members), zstd (several frames) and no compression, told apart by the first bytes. Whatever is given
out counts towards the layer's bounds and its `diff_id`, the digest of the plain stream.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import zstandard

ZSTD_STEP_BYTES = 1024
"""Fed to zstd at once: it cannot be told how much to give back, and a byte may become 32 KiB."""

ZSTD_WINDOW_BYTES_MAX = 1 << 27
_STEP_BYTES = 1 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UNKNOWN = {b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x04\x22\x4d\x18": "lz4"}


class Refused(Exception):
    """This layer must not be unpacked; the text is for the image's owner."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """`bytes` counts the plain tar, and apart from it what the files claim to hold (holes are cheap to write down).
    Beyond `ratio_from_bytes` a layer may be at most `ratio` times as large as its compressed bytes so far."""

    entries: int = 500_000
    bytes: int = 8 * 1024**3
    ratio: int = 200
    ratio_from_bytes: int = 256 * 1024**2


DEFAULT_BOUNDS = Bounds()


class Inflate:
    def __init__(self, source: IO[bytes], bounds: Bounds) -> None:
        self._source = source
        self._bounds = bounds
        self._hasher = hashlib.sha256()
        self._taken = self.given = 0
        self._buffer = b""
        self._chunks = self._open()

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._hasher.hexdigest()}"

    def read(self, size: int) -> bytes:
        parts, missing = [self._buffer], size - len(self._buffer)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            parts.append(chunk)
            missing -= len(chunk)
        data = b"".join(parts)
        self._buffer, data = data[size:], data[:size]
        self.given += len(data)
        self._hasher.update(data)
        if self.given > self._bounds.bytes:
            raise too_large(self._bounds.bytes)
        if self.given > self._bounds.ratio_from_bytes and self.given > self._bounds.ratio * self._taken:
            raise Refused(f"it unpacks to more than {self._bounds.ratio} times its size; that much is no program")
        return data

    def finish(self) -> None:
        """Read what follows the archive: it belongs to the `diff_id`, and a stream that breaks off there is broken."""
        while self.read(_STEP_BYTES):
            pass

    def _take(self, size: int) -> bytes:
        data = self._source.read(size)
        self._taken += len(data)
        return data

    def _open(self) -> Iterator[bytes]:
        head = self._take(4)
        if head[:2] == _GZIP:
            return self._gunzip(head)
        if head == _ZSTD or _is_skippable(head):
            return self._unzstd(head)
        for magic, name in _UNKNOWN.items():
            if head.startswith(magic):
                raise Refused(f"it is compressed with {name}; layers are plain tar, gzip or zstd")
        return self._plain(head)

    def _plain(self, head: bytes) -> Iterator[bytes]:
        yield head
        while chunk := self._take(_STEP_BYTES):
            yield chunk

    def _gunzip(self, head: bytes) -> Iterator[bytes]:
        inflater, data = zlib.decompressobj(31), head
        while True:
            yield inflater.decompress(data, _STEP_BYTES)
            data = inflater.unconsumed_tail
            if inflater.eof:
                data = self._next_member(inflater.unused_data)
                if not data:
                    return
                inflater = zlib.decompressobj(31)
            elif not data:
                data = self._take(1 << 16)
                if not data:
                    raise _cut()

    def _next_member(self, data: bytes) -> bytes:
        """What follows a gzip member, without the zeros with which tapes are padded; empty at the end."""
        while True:
            data = data.lstrip(b"\0")
            if len(data) < len(_GZIP):
                more = self._take(1 << 16)
                if not more:
                    break
                data += more
            elif data.startswith(_GZIP):
                return data
            else:
                break
        if data:
            raise Refused("other data follows the end of its compressed data")
        return b""

    def _unzstd(self, head: bytes) -> Iterator[bytes]:
        frames = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        data = head
        while data:
            if len(data) < len(_ZSTD):
                data += self._take(len(_ZSTD) - len(data))
            if _is_skippable(data[:4]):
                data = self._skip(data) or self._take(ZSTD_STEP_BYTES)
                continue
            inflater = frames.decompressobj()
            while True:
                yield inflater.decompress(data)
                if inflater.eof:
                    break
                data = self._take(ZSTD_STEP_BYTES)
                if not data:
                    raise _cut()
            data = inflater.unused_data or self._take(ZSTD_STEP_BYTES)

    def _skip(self, data: bytes) -> bytes:
        """Pass over a skippable frame, in which builders keep tables of their own; what was read behind it."""
        while len(data) < 8:
            more = self._take(8 - len(data))
            if not more:
                raise _cut()
            data += more
        missing = int.from_bytes(data[4:8], "little") - (len(data) - 8)
        if missing <= 0:
            return data[len(data) + missing :]
        while missing > 0:
            more = self._take(min(missing, _STEP_BYTES))
            if not more:
                raise _cut()
            missing -= len(more)
        return b""


def too_large(bytes_max: int) -> Refused:
    return Refused(f"it unpacks to more than {bytes_max} bytes")


def _cut() -> Refused:
    return Refused("the layer ends in the middle of its compressed data")


def _is_skippable(head: bytes) -> bool:
    return len(head) == 4 and head[1:] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
