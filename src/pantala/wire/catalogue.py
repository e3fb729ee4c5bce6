"""Catalogue frames on the bus.

Subjects: `pantala.cat.<owner>.delta` and `pantala.cat.<owner>.beat`; a reader that missed something asks any holder on
`pantala.cat.<owner>.fetch` (answered in chunks, the last one marked). A frame's payload is signed with its owner's key
and checked by each reader, whoever carried it.
"""

from __future__ import annotations

from typing import Any

import msgspec


class OwnedRow(msgspec.Struct, frozen=True, kw_only=True):
    """`seq` is the owner's sequence at which the row last changed; a null value is a tombstone."""

    stream: str
    key: str
    seq: int
    value: dict[str, Any] | None


class CatalogueFrame(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one owner, ordered: those after `after_seq` up to `seq`."""

    owner: str
    epoch: int
    after_seq: int
    seq: int
    rows: list[OwnedRow]
    last: bool = True


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """`count` and `digest` of the live rows let a reader find a silent difference."""

    owner: str
    epoch: int
    seq: int
    count: int
    digest: str


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """`payload`: JSON bytes of a frame or a beat; `signature`: Ed25519 over them."""

    owner: str
    payload: bytes
    signature: bytes


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    owner: str
    epoch: int
    after_seq: int
