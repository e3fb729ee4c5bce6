"""The owner's side: own rows in order, told to all, repeated to who asks. Implements `RowSink`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

import anyio
import anyio.abc
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
from pantala.wire.catalogue import Beat, CatalogueFrame, Fetch, HeldRows, OwnedRow

log = structlog.get_logger()

BEAT_S = 1.0
RESERVE = 1_000
ASK_HOLDERS_MAX = 3
ASK_TIMEOUT_S = 2.0
RETRY_S = 2.0
_FAR = 1 << 62
"""A sequence that nobody reaches: asked for rows after it, a holder answers with its proof alone."""

_FETCH = msgspec.json.Decoder(Fetch)
_HELD = msgspec.json.Decoder(HeldRows)


class Publisher:
    """Made by `open`; `put` works at once, `run` answers and beats. Bus silence costs readers freshness only.

    A new epoch replaces all that readers know of this owner, so it is `silent` until `replace_all` has said everything:
    otherwise readers would lose what serves for as long as the owner takes to start.

    `new_epoch` asks control for an epoch above the given one. It is needed when this owner's state was restored: others
    then hold words of it that it no longer knows. `holders` are nodes that may hold some.
    """

    def __init__(
        self,
        store: CatalogueStore,
        view: View,
        bus: Bus,
        signer: Signer,
        clock: Clock,
        *,
        owner: str,
        epoch: int,
        new_epoch: Callable[[int], Awaitable[int]] | None = None,
        holders: Callable[[], Sequence[str]] = tuple,
        beat_s: float = BEAT_S,
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
        self._new_epoch = new_epoch
        self._holders = holders
        self._beat_s = beat_s
        self._turn = anyio.Lock()
        self._rows: dict[tuple[str, str], OwnedRow] = {}
        self._reserved = 0
        self._opened = (0, 0)
        self._outrun_by = 0
        self._digest = frames.Digest()

    async def open(self) -> None:
        """Go on where this owner's last process stopped; sequences that it may have used are skipped."""
        owners, rows = await self._store.load()
        known = owners.get(self.owner)
        if known is None or known.epoch < self.epoch:
            await self._store.apply(
                self.owner, OwnerState(epoch=self.epoch, seq=0), [], at_ms=self._now_ms(), replace=True
            )
        else:
            self.epoch = known.epoch  # one that was asked for later than the settings were written
            self.silent = known.seq == 0
            self.seq = max(known.seq, known.reserved)
            self._opened = (known.seq, self.seq)
            for row in rows.get(self.owner, []):
                self._take(row if row.signature else frames.sign_row(self._signer, self.owner, self.epoch, row))
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
            self.silent = self._outrun_by > 0
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
            self._signed(OwnedRow(stream=key[0], key=key[1], seq=before + number, value=newest[key]))
            for number, key in enumerate(changed, start=1)
        ]
        seq = before + len(fresh)
        await self._store.apply(self.owner, OwnerState(epoch=self.epoch, seq=seq), fresh, at_ms=self._now_ms())
        self.seq = seq
        for row in fresh:
            self._take(row)
        self._view.apply(self.owner, fresh)
        for frame in () if self.silent else self._frames(before, fresh):
            await self._publish(frames.delta_subject(self.owner), frames.sign(self._signer, frame))
        return seq

    # -- what others ask -----------------------------------------------------------------------------------------------

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        await self._bus.serve(frames.fetch_subject(self.owner), self.answer)
        await self._bus.serve(frames.outrun_subject(self.owner), self.on_outrun)
        task_status.started()
        asked = False
        while True:
            if not asked:
                asked = await self._ask_holders()
            if self._outrun_by:
                await self._start_over()
            await self.beat()
            await self._clock.tick(self._beat_s)

    async def beat(self) -> None:
        if not self.silent:
            await self._publish(frames.beat_subject(self.owner), frames.sign(self._signer, self._position()))

    async def answer(self, subject: str, payload: bytes) -> bytes | None:
        """The first chunk after what the reader has; it asks again until the chunk marked `last`."""
        del subject
        wanted = frames.decoded(_FETCH, payload)
        if wanted is None or self.silent:
            return None
        after = wanted.after_seq if wanted.epoch == self.epoch else 0
        rows = sorted((row for row in self._rows.values() if row.seq > after), key=lambda row: row.seq)
        frame = next(self._frames(after, rows, chunk=True))
        return frames.sign(self._signer, frame)

    async def on_outrun(self, subject: str, payload: bytes) -> None:
        """A reader shows what this owner said: if that is more than it knows, its state is older than its words."""
        del subject
        said = frames.open_proof(payload, {self.owner: self._signer.verify_key}.get)
        if said is not None and (said.epoch, said.seq) > (self.epoch, self.seq):
            self._outrun(said)

    # -- a state that went back ----------------------------------------------------------------------------------------

    async def _ask_holders(self) -> bool:
        """Once after the start: does anyone hold words of this owner that it has forgotten? False: nobody answered."""
        wanted = msgspec.json.encode(Fetch(owner=self.owner, epoch=self.epoch, after_seq=_FAR))
        answered = False
        for holder in list(self._holders())[:ASK_HOLDERS_MAX]:
            try:
                reply = await self._bus.request(frames.rows_subject(holder), wanted, timeout_s=ASK_TIMEOUT_S)
            except PantalaError:
                continue
            answered = True
            held = frames.decoded(_HELD, reply)
            said = held and frames.open_proof(held.proof, {self.owner: self._signer.verify_key}.get)
            if said is None or said.epoch < self.epoch:
                continue
            # What lies between the file's last row and what it had put aside was said by an earlier life and is
            # forgotten: after a restore, or after a power cut, as the file is not synced row by row.
            forgotten = said.epoch == self.epoch and self._opened[0] < said.seq <= self._opened[1]
            if forgotten or (said.epoch, said.seq) > (self.epoch, self.seq):
                self._outrun(said)
        return answered or not self._holders()

    def _outrun(self, said: Beat) -> None:
        if not self._outrun_by:
            log.warning("this host's state is older than what it said; a new epoch is needed",
                        epoch=said.epoch, said=said.seq, known=self._opened[0])  # fmt: skip
        self._outrun_by = max(self._outrun_by, said.epoch)

    async def _start_over(self) -> None:
        """Say everything again in an epoch that control gives. Until then readers keep what they have."""
        if self._new_epoch is None:
            self._outrun_by = 0
            return
        self.silent = True
        try:
            epoch = await self._new_epoch(self._outrun_by)
        except PantalaError as error:
            log.warning("no new epoch yet; tried again", error=error.message)
            await self._clock.sleep(RETRY_S)
            return
        async with self._turn:
            self.epoch, self.seq, self._outrun_by = epoch, 0, 0
            live = [row for row in self._rows.values() if row.value is not None]
            self._rows, self._digest = {}, frames.Digest()
            for row in live:
                self.seq += 1
                self._take(self._signed(msgspec.structs.replace(row, seq=self.seq)))
            await self._reserve(self.seq)
            state = OwnerState(epoch=epoch, seq=self.seq)
            await self._store.apply(self.owner, state, [*self._rows.values()], at_ms=self._now_ms(), replace=True)
            self.silent = False
        log.info("started over in a new epoch", owner=self.owner, epoch=epoch, rows=len(live))

    # -- footnotes -----------------------------------------------------------------------------------------------------

    def _frames(self, after: int, rows: Sequence[OwnedRow], *, chunk: bool = False) -> Iterator[CatalogueFrame]:
        """At least one frame; together they lead from `after` to the newest sequence."""
        if chunk:
            pieces = frames.chunks(rows, bytes_max=frames.CHUNK_BYTES_MAX, rows_max=frames.CHUNK_ROWS_MAX)
        else:
            pieces = frames.chunks(rows)
        piece = next(pieces, [])
        while True:
            following = next(pieces, None)
            if following is None:
                yield CatalogueFrame(
                    owner=self.owner,
                    epoch=self.epoch,
                    after_seq=after,
                    seq=max(self.seq, after),
                    rows=piece,
                    count=self._digest.count,
                    digest=self._digest.text,
                )
                return
            seq = piece[-1].seq
            yield CatalogueFrame(
                owner=self.owner, epoch=self.epoch, after_seq=after, seq=max(seq, after), rows=piece, last=False
            )
            after, piece = seq, following

    def _position(self) -> Beat:
        return Beat(
            owner=self.owner,
            epoch=self.epoch,
            seq=self.seq,
            count=self._digest.count,
            digest=self._digest.text,
            at_ms=self._now_ms(),
        )

    def _signed(self, row: OwnedRow) -> OwnedRow:
        return frames.sign_row(self._signer, self.owner, self.epoch, row)

    def _take(self, row: OwnedRow) -> None:
        old = self._rows.get((row.stream, row.key))
        if old is not None:
            self._digest.remove(old)
        self._digest.add(row)
        self._rows[row.stream, row.key] = row

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
