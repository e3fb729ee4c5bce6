"""Reading the ring file that `pantala-init` writes (format: `pantala.wire.guest`).

The writer never waits for readers. It moves `tail` before it overwrites, so a reader that has copied bytes and then
still finds `tail` at or before their position has what was written; otherwise it was overtaken and goes on from `tail`.

By `pread` and never by a mapping: the file's other end is inside a machine, and a mapped file that shrinks kills its
reader. For the same reason every length is checked.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Literal

import msgspec

from pantala.errors import DriverError
from pantala.wire.guest import RING_HEADER_BYTES, RING_LINE_BYTES_MAX, RING_MAGIC

RING_VERSION = 1
RECORDS_MAX = 1000
RECORD_HEADER_BYTES = 13
RING_CAPACITY_MIN = 2 * (RECORD_HEADER_BYTES + RING_LINE_BYTES_MAX)

_HEADER = struct.Struct("<8sIIQQ")
_RECORD = struct.Struct("<IQB")
_STREAMS: dict[int, Literal["stdout", "stderr"]] = {1: "stdout", 2: "stderr"}
_STABLE_READS_MAX = 100
_OVERTAKEN_MAX = 8


class RingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`position` is that of the next record."""

    timestamp_ns: int
    stream: Literal["stdout", "stderr"]
    text: bytes
    position: int


class RingSlice(msgspec.Struct, frozen=True, kw_only=True):
    """Records from where the reader left off. `lost_bytes`: written after that place, overwritten before this read."""

    records: list[RingRecord]
    position: int
    lost_bytes: int


def create(path: Path, capacity: int) -> None:
    """An empty ring with all its blocks: PID 1 maps it, and a hole on a full disk would kill it."""
    if capacity < RING_CAPACITY_MIN:
        raise ValueError(f"a ring needs at least {RING_CAPACITY_MIN} bytes, not {capacity}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, RING_HEADER_BYTES + capacity)
        os.pwrite(fd, _HEADER.pack(RING_MAGIC, RING_VERSION, capacity, 0, 0), 0)
    finally:
        os.close(fd)


def read(path: Path, position: int, *, limit: int = RECORDS_MAX) -> RingSlice:
    """At most `limit` records from `position` on; 0 means the oldest kept. Raises DriverError if it is no ring."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return RingSlice(records=[], position=position, lost_bytes=0)
    try:
        return _read(fd, position, limit)
    finally:
        os.close(fd)


def _read(fd: int, position: int, limit: int) -> RingSlice:
    started_at = position
    for _ in range(_OVERTAKEN_MAX):
        capacity, head, tail = _header(fd)
        # Beyond the head: the ring was made anew since the caller looked.
        at = tail if position < tail or position > head else position
        content = _copy(fd, capacity, at, head)
        records, end, is_whole = _parse(content, at, limit)
        _, _, tail = _header(fd)
        if tail <= at:
            if not is_whole and not records:
                raise DriverError("the ring file holds a record that cannot be read")
            is_fresh = started_at == 0 or started_at > head
            return RingSlice(records=records, position=end, lost_bytes=0 if is_fresh else at - started_at)
        position = tail
    # The writer is faster than this reader: what was lost is said, and the next call goes on from here.
    return RingSlice(records=[], position=position, lost_bytes=max(0, position - started_at))


def _header(fd: int) -> tuple[int, int, int]:
    """Capacity, head, tail; read until two reads agree, since `pread` may split a number that is being written."""
    size = os.fstat(fd).st_size
    before = b""
    for _ in range(_STABLE_READS_MAX):
        now = os.pread(fd, _HEADER.size, 0)
        if now == before:
            break
        before = now
    if len(before) < _HEADER.size:
        raise DriverError("the ring file is shorter than its header")
    magic, version, capacity, head, tail = _HEADER.unpack(before)
    if magic != RING_MAGIC or version != RING_VERSION:
        raise DriverError("the file is not a ring of a known version")
    is_sound = RING_CAPACITY_MIN <= capacity <= size - RING_HEADER_BYTES and tail <= head <= tail + capacity
    if not is_sound:
        raise DriverError("the header of the ring file contradicts itself")
    return capacity, head, tail


def _copy(fd: int, capacity: int, start: int, end: int) -> bytes:
    length, at = end - start, start % capacity
    first = min(length, capacity - at)
    return os.pread(fd, first, RING_HEADER_BYTES + at) + os.pread(fd, length - first, RING_HEADER_BYTES)


def _parse(content: bytes, position: int, limit: int) -> tuple[list[RingRecord], int, bool]:
    """Records in `content`, the position after the last, and whether it was readable to the end or the limit."""
    records: list[RingRecord] = []
    at = 0
    while at < len(content) and len(records) < limit:
        if at + RECORD_HEADER_BYTES > len(content):
            return records, position + at, False
        length, timestamp_ns, stream = _RECORD.unpack_from(content, at)
        end = at + 4 + length
        text_bytes = length - (RECORD_HEADER_BYTES - 4)
        if not 0 <= text_bytes <= RING_LINE_BYTES_MAX or end > len(content) or stream not in _STREAMS:
            return records, position + at, False
        text = content[at + RECORD_HEADER_BYTES : end]
        at = end
        records.append(
            RingRecord(timestamp_ns=timestamp_ns, stream=_STREAMS[stream], text=text, position=position + at)
        )
    return records, position + at, True
