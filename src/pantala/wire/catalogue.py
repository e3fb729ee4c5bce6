"""Catalogue frames on the bus.

    pantala.cat.<owner>.delta     what changed, told to all
    pantala.cat.<owner>.beat      how far the owner is, told to all every second
    pantala.cat.<owner>.fetch     `Fetch` → signed frame: the rest, from the owner itself
    pantala.cat.<owner>.outrun    to the owner: it once said more than it knows now (its state was restored)
    pantala.cat.hold.<node>.rows  `Fetch` → `HeldRows`: the rest, from any node that holds it
    pantala.cat.hold.<node>.have  `Holdings` → `Holdings`: who of two knows more of whom

Frames and beats are signed with their owner's key, rows each for itself, so that it does not matter who carries them.
A holder can leave rows out but not invent any; what is left out shows in the owner's count and digest.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class OwnedRow(msgspec.Struct, frozen=True, kw_only=True):
    """`seq` is the owner's sequence at which the row last changed; a null value is a tombstone. `signature`: Ed25519 of
    the owner over `frames.row_words`; empty from owners of an older version, whose rows only they give."""

    stream: str
    key: str
    seq: int
    value: dict[str, Any] | None
    signature: bytes = b""


class CatalogueFrame(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one owner, ordered: those after `after_seq` up to `seq`. With `last`, `count` and `digest` are those of a
    beat at `seq` (`digest` empty: not told)."""

    owner: str
    epoch: int
    after_seq: int
    seq: int
    rows: list[OwnedRow]
    last: bool = True
    count: int = 0
    digest: str = ""


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """`count` and `digest` of the live rows let a reader find a silent difference. `at_ms`: the owner's clock when it
    said so; 0 from owners of an older version."""

    owner: str
    epoch: int
    seq: int
    count: int
    digest: str
    at_ms: int = 0


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """`payload`: JSON bytes of a frame or a beat; `signature`: Ed25519 over them."""

    owner: str
    payload: bytes
    signature: bytes


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    owner: str
    epoch: int
    after_seq: int


class HeldRows(msgspec.Struct, frozen=True, kw_only=True):
    """What a node holds of an owner after the asked sequence, tombstones too, in order; ask again after the last row
    until `last`. `seq`: how far the holder is. `proof`: the owner's newest signed frame or beat, empty if none is
    kept."""

    owner: str
    epoch: int
    seq: int
    rows: list[OwnedRow]
    last: bool
    proof: bytes = b""


class Holdings(msgspec.Struct, frozen=True, kw_only=True):
    """Owner to (epoch, sequence): how far `node` knows each. Unsigned: only a reason to ask."""

    node: str
    owners: dict[str, tuple[int, int]]


class SshRow(msgspec.Struct, frozen=True, kw_only=True):
    """Stream `certs`, key `ssh/authorities`, control's: the keys (OpenSSH) whose certificates machines believe. It
    stays with agents, which tell their machines at start."""

    authorities: list[str]


class EdgeKeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """Stream `certs`, key `edge/<node>`, control's: the edge key in use, sealed to that node's sealing key. It stays
    with agents; proxies get what it opens."""

    node: str
    public_key: str
    sealed_key: str


class PolicyRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Stream `routes`, key `policy/<app>/<policy id>/<part>`, control's: who of an app's machines may use which ports
    in one direction. It stays with agents. Rows add up, so that a policy is as many as it takes to keep each small.

    Machines are those with one of the ids, if any are named, and every pair of `metadata`. `ports`: `tcp/443`; none:
    nothing is open by this row, but what no row opens is closed."""

    app: str
    direction: Literal["ingress", "egress"]
    ports: list[str] = []
    machines: list[str] = []
    metadata: dict[str, str] = {}
