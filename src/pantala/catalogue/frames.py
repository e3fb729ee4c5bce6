"""Frames on the bus: signed by their owner, checked by every reader. Subjects and limits in one place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec

from pantala.kit.sealing import Signer, verify
from pantala.wire.catalogue import Beat, CatalogueFrame, OwnedRow, Signed

FRAME_BYTES_MAX = 256 * 1024
FRAME_ROWS_MAX = 500
CHUNK_BYTES_MAX = 3 * 1024 * 1024
CHUNK_ROWS_MAX = 10_000
"""Catch-up goes in few large chunks: with 200 ms between two hosts, rounds cost more than bytes. Base64 makes 4 MiB of
the bytes, half of what the bus carries in one message."""
ROW_BYTES_MAX = 64 * 1024
"""Certificate chains are the largest rows; all others stay below 512 bytes."""

T = TypeVar("T")

Keys = Callable[[str], str | None]

_MODULUS = 1 << 256

_SIGNED = msgspec.json.Decoder(Signed)
_FRAME = msgspec.json.Decoder(CatalogueFrame)
_BEAT = msgspec.json.Decoder(Beat)


def delta_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.delta"


def beat_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.beat"


def fetch_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.fetch"


def outrun_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.outrun"


def rows_subject(holder: str) -> str:
    return f"pantala.cat.hold.{holder}.rows"


def have_subject(holder: str) -> str:
    return f"pantala.cat.hold.{holder}.have"


def row_words(owner: str, epoch: int, row: OwnedRow) -> bytes:
    """What a row's signature is over."""
    return msgspec.json.encode(("row", owner, epoch, row.stream, row.key, row.seq, row.value), order="sorted")


def sign_row(signer: Signer, owner: str, epoch: int, row: OwnedRow) -> OwnedRow:
    return msgspec.structs.replace(row, signature=signer.sign(row_words(owner, epoch, row)))


def all_signed(key: str, owner: str, epoch: int, rows: Iterable[OwnedRow]) -> bool:
    """Did the owner say every one of these rows in this epoch? About 0.1 ms a row."""
    return all(verify(key, row_words(owner, epoch, row), row.signature) for row in rows)


def sign(signer: Signer, document: CatalogueFrame | Beat) -> bytes:
    payload = msgspec.json.encode(document)
    return msgspec.json.encode(Signed(owner=document.owner, payload=payload, signature=signer.sign(payload)))


def open_frame(data: bytes, keys: Keys) -> CatalogueFrame | None:
    """The frame if its owner really said it, else None."""
    checked = _checked(data, keys)
    frame = checked and decoded(_FRAME, checked.payload)
    return frame if checked and frame and frame.owner == checked.owner else None


def open_beat(data: bytes, keys: Keys) -> Beat | None:
    checked = _checked(data, keys)
    beat = checked and decoded(_BEAT, checked.payload)
    return beat if checked and beat and beat.owner == checked.owner else None


def open_proof(data: bytes, keys: Keys) -> Beat | None:
    """How far an owner was, by its own word: a beat, or the last frame of a change."""
    frame = open_frame(data, keys)
    if frame is None:
        return open_beat(data, keys)
    if not frame.last or not frame.digest:
        return None
    return Beat(owner=frame.owner, epoch=frame.epoch, seq=frame.seq, count=frame.count, digest=frame.digest)


def decoded(decoder: msgspec.json.Decoder[T], data: bytes) -> T | None:
    """What came over the bus, or None when it cannot be read."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _checked(data: bytes, keys: Keys) -> Signed | None:
    signed = decoded(_SIGNED, data)
    key = keys(signed.owner) if signed else None
    return signed if signed and key and verify(key, signed.payload, signed.signature) else None


def chunks(
    rows: Iterable[OwnedRow], *, bytes_max: int = FRAME_BYTES_MAX, rows_max: int = FRAME_ROWS_MAX
) -> Iterator[list[OwnedRow]]:
    """Rows in their order, in pieces that fit one message."""
    piece: list[OwnedRow] = []
    size = 0
    for row in rows:
        row_size = len(msgspec.json.encode(row))
        if piece and (len(piece) >= rows_max or size + row_size > bytes_max):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += row_size
    if piece:
        yield piece


class Digest:
    """Count and order-free digest of an owner's live rows, kept up row by row: the sum of their hashes modulo 2^256.

    A sum rather than an exclusive or, for which anyone could find rows that cancel out."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0

    def add(self, row: OwnedRow) -> None:
        if row.value is not None:
            self.count += 1
            self._sum = (self._sum + _hash(row)) % _MODULUS

    def remove(self, row: OwnedRow) -> None:
        if row.value is not None:
            self.count -= 1
            self._sum = (self._sum - _hash(row)) % _MODULUS

    def copy(self) -> Digest:
        other = Digest()
        other.count, other._sum = self.count, self._sum
        return other

    @property
    def text(self) -> str:
        return f"{self._sum:064x}"


def _hash(row: OwnedRow) -> int:
    data = msgspec.json.encode((row.stream, row.key, row.seq, row.value), order="sorted")
    return int.from_bytes(hashlib.sha256(data).digest())
