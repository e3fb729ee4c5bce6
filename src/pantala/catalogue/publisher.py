"""The owner's side: own rows in order, told to all, repeated to who asks. Implements `RowSink`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import anyio
import msgspec
import structlog

from pantala.catalogue import frames
from pantala.catalogue.store import CatalogueStore, OwnerState
from pantala.catalogue.view import View
from pantala.errors import PantalaError
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, unix_ms
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer
from pantala.wire.catalogue import Beat, CatalogueFrame, Fetch, OwnedRow

log = structlog.get_logger()

BEAT_S = 2.0
RESERVE = 1_000

_FETCH = msgspec.json.Decoder(Fetch)


class Publisher:
    """Made by `open`; `put` works at once, `run` answers and beats. Bus silence costs readers freshness only.

    A new epoch replaces all that readers know of this owner, so it is `silent` until `replace_all` has said everything:
    otherwise readers would lose what serves for as long as the owner takes to start.
    """

    def __init__(
        self, store: CatalogueStore, view: View, bus: Bus, signer: Signer, clock: Clock, *, owner: str, epoch: int
    ) -> None:
        self.owner = owner
        self.epoch = epoch
        self.seq = 0
        self.silent = True
        self._store = store
        self._view = view
        self._bus = bus
        self._signer = signer
        self._clock = clock
        self._turn = anyio.Lock()
        self._rows: dict[tuple[str, str], OwnedRow] = {}
        self._reserved = 0
        self._digest = frames.Digest()

    async def open(self) -> None:
        """Go on where this owner's last process stopped; sequences that it may have used are skipped."""
        owners, rows = await self._store.load()
        known = owners.get(self.owner)
        if known is None or known.epoch != self.epoch:
            await self._store.apply(
                self.owner, OwnerState(epoch=self.epoch, seq=0), [], at_ms=self._now_ms(), replace=True
            )
        else:
            self.silent = known.seq == 0
            self.seq = max(known.seq, known.reserved)
            for row in rows.get(self.owner, []):
                self._rows[row.stream, row.key] = row
                self._digest.add(row)
            self._view.apply(self.owner, self._rows.values(), replace=True)
        await self._reserve(self.seq)

    async def put(self, rows: Sequence[Row]) -> int:
        async with self._turn:
            return await self._put(rows)

    async def replace_all(self, rows: Sequence[Row]) -> int:
        async with self._turn:
            keep = {(row.stream, row.key) for row in rows}
            gone = [
                Row(stream, key, None)
                for (stream, key), row in self._rows.items()
                if row.value is not None and (stream, key) not in keep
            ]
            self.silent = False
            return await self._put([*gone, *rows])

    async def _put(self, rows: Sequence[Row]) -> int:
        newest = {(row.stream, row.key): row.value for row in rows}
        changed = [key for key, value in newest.items() if value != self._value(key)]
        if not changed:
            return self.seq
        before = self.seq
        if before + len(changed) > self._reserved:
            await self._reserve(before + len(changed))
        fresh = [
            OwnedRow(stream=key[0], key=key[1], seq=before + number, value=newest[key])
            for number, key in enumerate(changed, start=1)
        ]
        seq = before + len(fresh)
        await self._store.apply(self.owner, OwnerState(epoch=self.epoch, seq=seq), fresh, at_ms=self._now_ms())
        self.seq = seq
        for row in fresh:
            old = self._rows.get((row.stream, row.key))
            if old is not None:
                self._digest.remove(old)
            self._digest.add(row)
            self._rows[row.stream, row.key] = row
        self._view.apply(self.owner, fresh)
        for frame in () if self.silent else self._frames(before, fresh):
            await self._publish(frames.delta_subject(self.owner), frames.sign(self._signer, frame))
        return seq

    # -- what others ask -----------------------------------------------------------------------------------------------

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        await self._bus.serve(frames.fetch_subject(self.owner), self.answer)
        task_status.started()
        while True:
            await self.beat()
            await self._clock.sleep(BEAT_S)

    async def beat(self) -> None:
        if self.silent:
            return
        document = Beat(
            owner=self.owner, epoch=self.epoch, seq=self.seq, count=self._digest.count, digest=self._digest.text
        )
        await self._publish(frames.beat_subject(self.owner), frames.sign(self._signer, document))

    async def answer(self, subject: str, payload: bytes) -> bytes | None:
        """The first chunk after what the reader has; it asks again until the chunk marked `last`."""
        del subject
        try:
            wanted = _FETCH.decode(payload)
        except msgspec.DecodeError:
            return None
        if self.silent:
            return None
        after = wanted.after_seq if wanted.epoch == self.epoch else 0
        rows = sorted((row for row in self._rows.values() if row.seq > after), key=lambda row: row.seq)
        frame = next(self._frames(after, rows))
        return frames.sign(self._signer, frame)

    def _frames(self, after: int, rows: Sequence[OwnedRow]) -> Iterator[CatalogueFrame]:
        """At least one frame; together they lead from `after` to the newest sequence."""
        pieces = list(frames.chunks(rows)) or [[]]
        for number, piece in enumerate(pieces, start=1):
            last = number == len(pieces)
            seq = self.seq if last else piece[-1].seq
            yield CatalogueFrame(
                owner=self.owner, epoch=self.epoch, after_seq=after, seq=max(seq, after), rows=piece, last=last
            )
            after = seq

    # -- footnotes -----------------------------------------------------------------------------------------------------

    def _value(self, key: tuple[str, str]) -> object:
        row = self._rows.get(key)
        return row.value if row is not None else None

    async def _reserve(self, up_to: int) -> None:
        self._reserved = up_to + RESERVE
        await self._store.reserve(self.owner, OwnerState(epoch=self.epoch, seq=self.seq, reserved=self._reserved))

    async def _publish(self, subject: str, data: bytes) -> None:
        try:
            await self._bus.publish(subject, data)
        except PantalaError as error:
            log.debug("bus is silent; readers catch up by the next beat", subject=subject, error=str(error))

    def _now_ms(self) -> int:
        return unix_ms(self._clock.now())
