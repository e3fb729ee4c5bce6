"""The reader's side: frames of other owners, checked, put in order, asked for when missed.

A delta that follows what is known is applied; one that leaves a gap, or a beat that tells of more, makes the owner be
asked for the rest. A new epoch replaces whatever the owner said before. Beats of equal sequence but another digest
reveal a silent difference: then everything of that owner is fetched again.
"""

from __future__ import annotations

import anyio
import msgspec
import structlog

from pantala.catalogue import frames
from pantala.catalogue.store import CatalogueStore, OwnerState
from pantala.catalogue.view import View
from pantala.errors import PantalaError
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, unix_ms
from pantala.wire.catalogue import CatalogueFrame, Fetch, OwnedRow

log = structlog.get_logger()

FETCH_TIMEOUT_S = 5.0
FETCH_PAUSE_S = 0.2
CHUNKS_MAX = 10_000
TOMBSTONES_KEPT_S = 7 * 24 * 3600


class _Owner:
    def __init__(self, state: OwnerState) -> None:
        self.state = state
        self.rows: dict[tuple[str, str], OwnedRow] = {}
        self.digest = frames.Digest()

    def take(self, row: OwnedRow) -> None:
        if (old := self.rows.get((row.stream, row.key))) is not None:
            self.digest.remove(old)
        self.digest.add(row)
        self.rows[row.stream, row.key] = row


class Replica:
    """`keys` gives the key that an owner's words must be signed with, None for those nobody knows. `own`: the owner
    that this process publishes for, whose frames need no reading."""

    def __init__(
        self, store: CatalogueStore, view: View, bus: Bus, clock: Clock, keys: frames.Keys, *, own: str = ""
    ) -> None:
        self._store = store
        self._view = view
        self._bus = bus
        self._clock = clock
        self._keys = keys
        self._own = own
        self._owners: dict[str, _Owner] = {}
        self._turn = anyio.Lock()
        self._missing: dict[str, bool] = {}
        self._nudged = anyio.Event()
        self.refused = 0

    async def open(self) -> None:
        """The view as it was when this host last knew it: stale is better than nothing."""
        owners, rows = await self._store.load()
        for owner, state in owners.items():
            if owner != self._own:
                known = self._owners[owner] = _Owner(state)
                for row in rows.get(owner, []):
                    known.take(row)
                self._view.apply(owner, known.rows.values(), replace=True)

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        await self._bus.serve(frames.delta_subject("*"), self.on_delta)
        await self._bus.serve(frames.beat_subject("*"), self.on_beat)
        task_status.started()
        while True:
            self._nudged = anyio.Event()
            for owner in list(self._missing):
                await self.catch_up(owner)
            if self._missing:
                await self._clock.sleep(FETCH_PAUSE_S)
            else:
                await self._nudged.wait()

    # -- what is heard -------------------------------------------------------------------------------------------------

    async def on_delta(self, subject: str, payload: bytes) -> None:
        del subject
        frame = frames.open_frame(payload, self._keys)
        if frame is None:
            self.refused += 1
            return
        if frame.owner == self._own:
            return
        async with self._turn:
            known = self._owners.get(frame.owner)
            if known is None or frame.epoch > known.state.epoch:
                if frame.after_seq == 0 and frame.last:  # a part of it would take the rest away
                    await self._apply(frame.owner, frame.epoch, frame.seq, frame.rows, replace=True)
                else:
                    self._ask(frame.owner, whole=True)
            elif frame.epoch < known.state.epoch or frame.seq <= known.state.seq:
                return  # of an older epoch, or already known
            elif frame.after_seq > known.state.seq:
                self._ask(frame.owner)
            else:
                await self._apply(frame.owner, frame.epoch, frame.seq, frame.rows)

    async def on_beat(self, subject: str, payload: bytes) -> None:
        del subject
        beat = frames.open_beat(payload, self._keys)
        if beat is None:
            self.refused += 1
            return
        if beat.owner == self._own:
            return
        async with self._turn:
            known = self._owners.get(beat.owner)
            if known is None or beat.epoch > known.state.epoch:
                self._ask(beat.owner, whole=True)
            elif beat.epoch < known.state.epoch or beat.seq < known.state.seq:
                return
            elif beat.seq > known.state.seq:
                self._ask(beat.owner)
            elif (beat.count, beat.digest) != (known.digest.count, known.digest.text):
                log.warning("catalogue differs silently; fetching all of it again", owner=beat.owner)
                self._ask(beat.owner, whole=True)

    def _ask(self, owner: str, *, whole: bool = False) -> None:
        self._missing[owner] = whole or self._missing.get(owner, False)
        self._nudged.set()

    # -- what is asked for ---------------------------------------------------------------------------------------------

    async def catch_up(self, owner: str) -> bool:
        """Fetch what is missing of an owner; False when it has to be tried again."""
        whole = self._missing.get(owner, False)
        known = self._owners.get(owner)
        epoch, after = (0, 0) if known is None or whole else (known.state.epoch, known.state.seq)
        rows: list[OwnedRow] = []
        begun_at = after
        for _ in range(CHUNKS_MAX):
            frame = await self._fetch(owner, epoch, after)
            if frame is None:
                return False
            if frame.epoch != epoch:
                if frame.after_seq != 0:
                    return False
                epoch, begun_at, rows = frame.epoch, 0, []
            elif frame.after_seq > after:
                return False
            rows += frame.rows
            after = frame.seq
            if frame.last:
                break
        async with self._turn:
            known = self._owners.get(owner)
            newer_epoch = known is None or epoch > known.state.epoch
            if not newer_epoch and known is not None and epoch < known.state.epoch:
                return False
            replace = newer_epoch or (whole and begun_at == 0)
            if replace and known is not None and epoch == known.state.epoch and after < known.state.seq:
                return False  # deltas overtook the fetch; what they said must not be undone
            if known is not None and not replace and begun_at > known.state.seq:
                return False
            await self._apply(owner, epoch, after, rows, replace=replace)
            self._missing.pop(owner, None)
        return True

    async def _fetch(self, owner: str, epoch: int, after: int) -> CatalogueFrame | None:
        wanted = msgspec.json.encode(Fetch(owner=owner, epoch=epoch, after_seq=after))
        try:
            reply = await self._bus.request(frames.fetch_subject(owner), wanted, timeout_s=FETCH_TIMEOUT_S)
        except PantalaError as error:
            log.debug("owner does not answer; the view stays as it is", owner=owner, error=str(error))
            return None
        frame = frames.open_frame(reply, self._keys)
        if frame is None or frame.owner != owner:
            self.refused += 1
            return None
        return frame

    async def _apply(self, owner: str, epoch: int, seq: int, rows: list[OwnedRow], *, replace: bool = False) -> None:
        """The caller holds the turn. Rows older than what is known are left out: frames may overlap."""
        known = self._owners.get(owner)
        if known is None or replace:
            known = _Owner(OwnerState(epoch=epoch, seq=0))
        fresh = [row for row in rows if (old := known.rows.get((row.stream, row.key))) is None or row.seq > old.seq]
        state = OwnerState(epoch=epoch, seq=max(seq, known.state.seq))
        await self._store.apply(owner, state, fresh, at_ms=unix_ms(self._clock.now()), replace=replace)
        known.state = state
        for row in fresh:
            known.take(row)
        self._owners[owner] = known
        self._view.apply(owner, fresh, replace=replace)
