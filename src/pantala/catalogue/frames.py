"""Frames on the bus: signed by their owner, checked by every reader. Subjects and limits in one place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import msgspec

from pantala.kit.sealing import Signer, verify
from pantala.wire.catalogue import Beat, CatalogueFrame, OwnedRow, Signed

FRAME_BYTES_MAX = 256 * 1024
FRAME_ROWS_MAX = 500
ROW_BYTES_MAX = 64 * 1024
"""Certificate chains are the largest rows; all others stay below 512 bytes."""

Keys = Callable[[str], str | None]

_SIGNED = msgspec.json.Decoder(Signed)
_FRAME = msgspec.json.Decoder(CatalogueFrame)
_BEAT = msgspec.json.Decoder(Beat)


def delta_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.delta"


def beat_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.beat"


def fetch_subject(owner: str) -> str:
    return f"pantala.cat.{owner}.fetch"


def sign(signer: Signer, document: CatalogueFrame | Beat) -> bytes:
    payload = msgspec.json.encode(document)
    return msgspec.json.encode(Signed(owner=document.owner, payload=payload, signature=signer.sign(payload)))


def open_frame(data: bytes, keys: Keys) -> CatalogueFrame | None:
    """The frame if its owner really said it, else None."""
    payload = _checked(data, keys)
    if payload is None:
        return None
    try:
        frame = _FRAME.decode(payload[1])
    except msgspec.DecodeError:
        return None
    return frame if frame.owner == payload[0] else None


def open_beat(data: bytes, keys: Keys) -> Beat | None:
    payload = _checked(data, keys)
    if payload is None:
        return None
    try:
        beat = _BEAT.decode(payload[1])
    except msgspec.DecodeError:
        return None
    return beat if beat.owner == payload[0] else None


def _checked(data: bytes, keys: Keys) -> tuple[str, bytes] | None:
    try:
        signed = _SIGNED.decode(data)
    except msgspec.DecodeError:
        return None
    key = keys(signed.owner)
    if key is None or not verify(key, signed.payload, signed.signature):
        return None
    return signed.owner, signed.payload


def chunks(rows: Iterable[OwnedRow]) -> Iterator[list[OwnedRow]]:
    """Rows in their order, in pieces that fit one frame."""
    piece: list[OwnedRow] = []
    size = 0
    for row in rows:
        row_size = len(msgspec.json.encode(row))
        if piece and (len(piece) >= FRAME_ROWS_MAX or size + row_size > FRAME_BYTES_MAX):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += row_size
    if piece:
        yield piece


class Digest:
    """Count and order-free digest of an owner's live rows, kept up row by row."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0

    def add(self, row: OwnedRow) -> None:
        if row.value is not None:
            self.count += 1
            self._sum ^= _hash(row)

    def remove(self, row: OwnedRow) -> None:
        if row.value is not None:
            self.count -= 1
            self._sum ^= _hash(row)

    @property
    def text(self) -> str:
        return f"{self._sum:032x}"


def _hash(row: OwnedRow) -> int:
    data = msgspec.json.encode((row.stream, row.key, row.seq, row.value), order="sorted")
    return int.from_bytes(hashlib.sha256(data).digest()[:16])
