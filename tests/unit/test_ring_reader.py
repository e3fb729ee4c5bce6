"""The reader of the output ring against a writer that follows the format's description word by word."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantala.drivers import ring
from pantala.errors import DriverError
from pantala.wire.guest import RING_HEADER_BYTES, RING_LINE_BYTES_MAX

CAPACITY = ring.RING_CAPACITY_MIN + 11


class ReferenceWriter:
    """`pantala.wire.guest`: tail moves before anything is overwritten, head after the record is whole."""

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        ring.create(path, capacity)
        self.path, self.capacity = path, capacity
        self.head = self.tail = 0
        self.lengths: list[int] = []

    def append(self, stream: int, text: bytes, *, on_step: object = None) -> None:
        record = struct.pack("<IQB", 9 + len(text), len(self.lengths), stream) + text
        with self.path.open("r+b") as file:
            while self.head + len(record) - self.tail > self.capacity:
                self.tail += self.lengths.pop(0)
            self._number(file.fileno(), 24, self.tail)
            if callable(on_step):
                on_step("tail moved")
            half = len(record) // 2
            self._wrapped(file.fileno(), self.head, record[:half])
            if callable(on_step):
                on_step("half written")
            self._wrapped(file.fileno(), self.head + half, record[half:])
            self.head += len(record)
            self.lengths.append(len(record))
            self._number(file.fileno(), 16, self.head)

    def _wrapped(self, fd: int, position: int, data: bytes) -> None:
        at = position % self.capacity
        first = min(len(data), self.capacity - at)
        os.pwrite(fd, data[:first], RING_HEADER_BYTES + at)
        os.pwrite(fd, data[first:], RING_HEADER_BYTES)

    @staticmethod
    def _number(fd: int, offset: int, value: int) -> None:
        os.pwrite(fd, struct.pack("<Q", value), offset)


def texts(part: ring.RingSlice) -> list[bytes]:
    return [record.text for record in part.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ring"


def test_an_empty_ring_has_nothing(path: Path) -> None:
    ReferenceWriter(path)
    assert ring.read(path, 0) == ring.RingSlice(records=[], position=0, lost_bytes=0)


def test_a_ring_that_is_not_there_has_nothing(path: Path) -> None:
    assert ring.read(path, 17).records == []


def test_reading_continues_after_the_last_record(path: Path) -> None:
    writer = ReferenceWriter(path)
    writer.append(1, b"one")
    writer.append(2, b"")
    first = ring.read(path, 0, limit=1)
    assert texts(first) == [b"one"]
    rest = ring.read(path, first.position)
    assert [(record.stream, record.text) for record in rest.records] == [("stderr", b"")]
    assert ring.read(path, rest.position).records == []


def test_a_slow_reader_skips_to_the_tail_and_is_told(path: Path) -> None:
    writer = ReferenceWriter(path)
    writer.append(1, b"first")
    position = ring.read(path, 0).position
    for _ in range(4):
        writer.append(1, b"x" * RING_LINE_BYTES_MAX)
    part = ring.read(path, position)
    assert len(part.records) == 2
    assert part.lost_bytes == writer.tail - position > 0
    assert ring.read(path, 0).lost_bytes == 0


def test_a_ring_made_anew_is_read_from_its_start(path: Path) -> None:
    writer = ReferenceWriter(path)
    writer.append(1, b"a longer line than the next")
    position = ring.read(path, 0).position
    ReferenceWriter(path).append(1, b"new")
    part = ring.read(path, position)
    assert (texts(part), part.lost_bytes) == ([b"new"], 0)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.integers(0, 255).map(lambda byte: bytes([byte]) * RING_LINE_BYTES_MAX),
        st.integers(1, 9000).map(lambda length: b"l" * length),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, reads=st.lists(st.integers(0, 39), max_size=10))
def test_a_reader_sees_every_line_once_in_order_or_a_gap(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], reads: list[int]
) -> None:
    writer = ReferenceWriter(tmp_path_factory.mktemp("ring") / "ring")
    seen: list[bytes] = []
    position, has_lost = 0, False

    def look() -> None:
        nonlocal position, has_lost
        # From the start there is no gap to report: 0 means the oldest that is kept.
        has_lost = has_lost or (position == 0 and writer.tail > 0)
        part = ring.read(writer.path, position)
        has_lost = has_lost or part.lost_bytes > 0
        position = part.position
        seen.extend(texts(part))

    for index, line in enumerate(lines):
        writer.append(1 + index % 2, line)
        if index in reads:
            look()
    look()
    assert is_subsequence(seen, lines)
    assert seen[-1:] == lines[-1:]
    if not has_lost:
        assert seen == lines


def is_subsequence(part: list[bytes], whole: list[bytes]) -> bool:
    rest = iter(whole)
    return all(any(item == other for other in rest) for item in part)


def test_a_reader_in_the_middle_of_a_write_never_sees_a_torn_record(path: Path) -> None:
    writer = ReferenceWriter(path)
    whole = [bytes([65 + index % 26]) * (3000 + 97 * index) for index in range(60)]
    looks = 0

    def look(_: str) -> None:
        nonlocal looks
        looks += 1
        for record in ring.read(path, 0).records:
            assert record.text in whole

    for line in whole:
        writer.append(1, line, on_step=look)
    assert looks == 120


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param((0, b"NOTARING"), id="magic"),
        pytest.param((8, struct.pack("<I", 9)), id="version"),
        pytest.param((12, struct.pack("<I", 2**31)), id="capacity"),
        pytest.param((16, struct.pack("<Q", 2**60)), id="head"),
        pytest.param((RING_HEADER_BYTES, struct.pack("<I", 2**31)), id="length"),
        pytest.param((RING_HEADER_BYTES + 12, b"\x07"), id="stream"),
    ],
)
def test_a_damaged_ring_is_an_error_and_no_crash(path: Path, damage: tuple[int, bytes]) -> None:
    writer = ReferenceWriter(path)
    writer.append(1, b"line")
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), damage[1], damage[0])
    with pytest.raises(DriverError):
        ring.read(path, 0)


def test_a_ring_cut_short_is_an_error_and_no_crash(path: Path) -> None:
    ReferenceWriter(path).append(1, b"line")
    os.truncate(path, 100)
    with pytest.raises(DriverError):
        ring.read(path, 0)


def test_a_ring_smaller_than_its_longest_record_is_not_made(path: Path) -> None:
    with pytest.raises(ValueError, match="at least"):
        ring.create(path, 1000)
