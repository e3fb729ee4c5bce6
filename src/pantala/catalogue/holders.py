"""Nodes as holders of each other's rows: what one holds it gives to who asks, and two compare how far they are.

So a reader gets the rows of an owner that is away, and a cluster whose control plane is off still comes to agree.
Used by `Replica`, which checks what it gets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from pantala.catalogue import frames
from pantala.errors import PantalaError
from pantala.kit.bus import Bus
from pantala.wire.catalogue import Fetch, HeldRows, Holdings, OwnedRow

if TYPE_CHECKING:
    from pantala.catalogue.replica import Owned

log = structlog.get_logger()

TIMEOUT_S = 5.0
CHUNKS_MAX = 10_000

_FETCH = msgspec.json.Decoder(Fetch)
_HELD = msgspec.json.Decoder(HeldRows)
_HOLDINGS = msgspec.json.Decoder(Holdings)


class Holders:
    """`owners` is the replica's own table, read here and written there."""

    def __init__(
        self,
        bus: Bus,
        *,
        own: str,
        holders: Callable[[], Sequence[str]],
        owners: Mapping[str, Owned],
        dice: random.Random | None = None,
    ) -> None:
        self._bus = bus
        self._own = own
        self._all = holders
        self._owners = owners
        self._dice = dice or random.Random()  # noqa: S311 - who is asked first needs no secrecy
        self._known_to_hold: dict[str, str] = {}

    # -- what this node gives ------------------------------------------------------------------------------------------

    async def answer_rows(self, subject: str, payload: bytes) -> bytes | None:
        del subject
        wanted = frames.decoded(_FETCH, payload)
        if wanted is None:
            return None
        known = self._owners.get(wanted.owner)
        if known is None:
            return msgspec.json.encode(HeldRows(owner=wanted.owner, epoch=0, seq=0, rows=[], last=True))
        after = wanted.after_seq if wanted.epoch == known.state.epoch else 0
        rows = sorted((row for row in known.rows.values() if row.seq > after), key=lambda row: row.seq)
        pieces = frames.chunks(rows, bytes_max=frames.CHUNK_BYTES_MAX, rows_max=frames.CHUNK_ROWS_MAX)
        piece, more = next(pieces, []), next(pieces, None) is not None
        return msgspec.json.encode(
            HeldRows(
                owner=wanted.owner,
                epoch=known.state.epoch,
                seq=known.state.seq,
                rows=piece,
                last=not more,
                proof=known.state.proof,
            )
        )

    def holdings(self, *, ahead_of: Mapping[str, tuple[int, int]] | None = None) -> Holdings:
        """How far this node knows each owner; with `ahead_of` only those that it knows better."""
        mine = {owner: (known.state.epoch, known.state.seq) for owner, known in self._owners.items()}
        if ahead_of is not None:
            mine = {owner: at for owner, at in mine.items() if at > tuple(ahead_of.get(owner, (0, 0)))}
        return Holdings(node=self._own, owners=mine)

    def read_holdings(self, payload: bytes) -> Holdings | None:
        return frames.decoded(_HOLDINGS, payload)

    # -- what it asks of others ----------------------------------------------------------------------------------------

    def remember(self, owner: str, holder: str) -> None:
        self._known_to_hold[owner] = holder

    def to_ask(self, owner: str, most: int) -> list[str]:
        """Other nodes in the order in which to ask them about an owner: who is known to have something first, and
        `most` of them. When nobody is, one by lot: there may be nothing to be had, and by asking around
        (`exchange`) it shows who has it."""
        others = [node for node in self._all() if node not in (self._own, owner)]
        self._dice.shuffle(others)
        first = self._known_to_hold.get(owner)
        return sorted(others, key=lambda node: node != first)[: most if first is not None else 1]

    async def fetch(self, holder: str, owner: str, epoch: int, after: int) -> HeldRows | None:
        """Everything that a holder has after a sequence, chunk after chunk; None when it does not answer or changed
        its mind on the way."""
        rows: list[OwnedRow] = []
        for _ in range(CHUNKS_MAX):
            wanted = msgspec.json.encode(Fetch(owner=owner, epoch=epoch, after_seq=after))
            try:
                reply = await self._bus.request(frames.rows_subject(holder), wanted, timeout_s=TIMEOUT_S)
            except PantalaError as error:
                log.debug("holder does not answer", holder=holder, owner=owner, error=str(error))
                return None
            held = frames.decoded(_HELD, reply)
            if held is None or held.owner != owner or held.epoch == 0:
                return None
            if held.epoch != epoch:
                if rows:
                    return None
                epoch = held.epoch
            rows += held.rows
            if held.last:
                return msgspec.structs.replace(held, rows=rows)
            if not held.rows or held.rows[-1].seq <= after:
                return None
            after = held.rows[-1].seq
        return None

    async def exchange(self) -> Holdings | None:
        """Tell one other node, drawn by lot, how far this one is; what it knows better."""
        others = [node for node in self._all() if node != self._own]
        if not others:
            return None
        holder = self._dice.choice(others)
        try:
            reply = await self._bus.request(
                frames.have_subject(holder), msgspec.json.encode(self.holdings()), timeout_s=TIMEOUT_S
            )
        except PantalaError:
            return None
        return self.read_holdings(reply)
