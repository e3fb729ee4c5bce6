"""The reader's side: frames of other owners, checked, put in order, asked for when missed.

A delta that follows what is known is applied; one that leaves a gap, or a beat that tells of more, makes the owner be
asked for the rest, and when it does not answer, others that hold its rows (`holders.py`). A new epoch replaces whatever
the owner said before. Beats of equal sequence but another digest reveal a silent difference: then everything of that
owner is fetched again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
import structlog

from pantala.catalogue import frames
from pantala.catalogue.ahead import Ahead
from pantala.catalogue.holders import Holders
from pantala.catalogue.store import CatalogueStore, OwnerState
from pantala.catalogue.view import View
from pantala.errors import PantalaError
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, unix_ms
from pantala.wire.catalogue import Beat, CatalogueFrame, Fetch, Holdings, OwnedRow

log = structlog.get_logger()

FETCH_TIMEOUT_S = 5.0
FETCH_PAUSE_S, FETCH_PAUSE_S_MAX = 0.2, 5.0
"""Before an owner is asked for again of whom nobody had anything: twice as long each time, and at once when it is
heard. While a cluster starts most owners are not there yet, and every reader asks for each of them."""
ROUNDS_MAX = 25
"""Rounds in which nobody had anything: then the next beat or hint may ask again."""
CHUNKS_MAX = 10_000
HOLDERS_ASKED_MAX = 3
GOSSIP_S = 1.0
PROOF_BYTES_MAX = 64 * 1024
TOMBSTONES_KEPT_S = 7 * 24 * 3600


class Owned:
    """What is known of one owner."""

    def __init__(self, state: OwnerState) -> None:
        self.state = state
        self.rows: dict[tuple[str, str], OwnedRow] = {}
        self.digest = frames.Digest()

    def take(self, row: OwnedRow) -> None:
        if (old := self.rows.get((row.stream, row.key))) is not None:
            self.digest.remove(old)
        self.digest.add(row)
        self.rows[row.stream, row.key] = row


class _Missing(msgspec.Struct):
    """`whole`: everything is wanted again. `rounds`: how often nobody had anything. `due_at`: not asked for before."""

    whole: bool = False
    rounds: int = 0
    due_at: float = 0.0


class Replica:
    """`keys` gives the key that an owner's words must be signed with, None for those nobody knows. `own`: the owner
    that this process publishes for, whose frames need no reading. `holders`: nodes that hold others' rows too."""

    def __init__(
        self,
        store: CatalogueStore,
        view: View,
        bus: Bus,
        clock: Clock,
        keys: frames.Keys,
        *,
        own: str = "",
        holders: Callable[[], Sequence[str]] = tuple,
        gossip_s: float = GOSSIP_S,
        dice: random.Random | None = None,
    ) -> None:
        self._store = store
        self._view = view
        self._bus = bus
        self._clock = clock
        self._keys = keys
        self._own = own
        self._owners: dict[str, Owned] = {}
        self._holders = Holders(bus, own=own, holders=holders, owners=self._owners, dice=dice)
        self._gossip_s = gossip_s
        self._turn = anyio.Lock()
        self._missing: dict[str, _Missing] = {}
        self._nudged = anyio.Event()
        self.heard_at: dict[str, float] = {}
        """Monotonic time of the newest word that each owner said itself, since this process runs."""
        self._ahead: dict[str, Ahead] = {}
        self.refused = 0

    async def open(self) -> None:
        """The view as it was when this host last knew it: stale is better than nothing."""
        owners, rows = await self._store.load()
        # Control first: what it says decides who else is believed.
        for owner in sorted(owners, key=lambda owner: owner != self._view.control):
            if owner == self._own:
                continue
            if self._keys(owner) is None:
                await self._store.forget_owner(owner)
                continue
            known = self._owners[owner] = Owned(owners[owner])
            for row in rows.get(owner, []):
                known.take(row)
            self._view.apply(owner, known.rows.values(), replace=True)

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        await self._bus.serve(frames.delta_subject("*"), self.on_delta)
        await self._bus.serve(frames.beat_subject("*"), self.on_beat)
        if self._own:
            await self._bus.serve(frames.rows_subject(self._own), self._holders.answer_rows)
            await self._bus.serve(frames.have_subject(self._own), self.on_have)
        task_status.started()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._gossip)
            while True:
                self._nudged = anyio.Event()
                for owner in self._due():
                    await self.catch_up(owner)
                if self._missing:
                    await self._clock.sleep(FETCH_PAUSE_S)
                else:
                    await self._nudged.wait()

    def hurry(self) -> None:
        """The bus is there (again): what is missing may be had now."""
        for owner in self._missing:
            self._ask(owner)

    def expect(self, owner: str) -> None:
        """There is such an owner: ask for its rows unless they are known."""
        if owner != self._own and owner not in self._owners:
            self._ask(owner, whole=True)

    async def forget(self, owner: str) -> None:
        """It belongs to the cluster no more: nothing that it said counts."""
        async with self._turn:
            self._missing.pop(owner, None)
            self.heard_at.pop(owner, None)
            self._ahead.pop(owner, None)
            if self._owners.pop(owner, None) is not None:
                await self._store.forget_owner(owner)
                self._view.apply(owner, [], replace=True)

    # -- what is heard -------------------------------------------------------------------------------------------------

    async def on_delta(self, subject: str, payload: bytes) -> None:
        del subject
        frame = frames.open_frame(payload, self._keys)
        if frame is None:
            self.refused += 1
            return
        if frame.owner == self._own:
            return
        proof = payload if frame.last and frame.digest and len(payload) <= PROOF_BYTES_MAX else b""
        async with self._turn:
            known = self._owners.get(frame.owner)
            self._hear(frame.owner, frame.epoch, frame.seq)
            if known is None or frame.epoch > known.state.epoch:
                if frame.after_seq == 0 and frame.last:  # a part of it would take the rest away
                    await self._apply(frame.owner, frame.epoch, frame.seq, frame.rows, replace=True, proof=proof)
                    self._missing.pop(frame.owner, None)  # that was all of it
                else:
                    self._ask(frame.owner, whole=True)
            elif frame.epoch < known.state.epoch or frame.seq <= known.state.seq:
                return  # of an older epoch, or already known
            elif frame.after_seq > known.state.seq:
                self._ask(frame.owner)
            else:
                await self._apply(frame.owner, frame.epoch, frame.seq, frame.rows, proof=proof)

    async def on_beat(self, subject: str, payload: bytes) -> None:
        del subject
        beat = frames.open_beat(payload, self._keys)
        if beat is None:
            self.refused += 1
            return
        if beat.owner == self._own:
            return
        behind = b""
        async with self._turn:
            known = self._owners.get(beat.owner)
            self._hear(beat.owner, beat.epoch, beat.seq)
            if beat.at_ms:
                self._ahead.setdefault(beat.owner, Ahead()).hear(beat.at_ms, self._clock.monotonic())
            if known is None or beat.epoch > known.state.epoch:
                self._ask(beat.owner, whole=True)
            elif (beat.epoch, beat.seq) < (known.state.epoch, known.state.seq):
                behind = known.state.proof
            elif beat.seq > known.state.seq:
                self._ask(beat.owner)
            elif (beat.count, beat.digest) != (known.digest.count, known.digest.text):
                log.warning("catalogue differs silently; fetching all of it again", owner=beat.owner)
                self._ask(beat.owner, whole=True)
            else:
                known.state = msgspec.structs.replace(known.state, proof=payload)
                if (missing := self._missing.get(beat.owner)) and not missing.whole:
                    self._missing.pop(beat.owner)
        if behind:
            await self._send(frames.outrun_subject(beat.owner), behind)

    def ahead_ms(self, owner: str) -> int | None:
        """What its clock shows more than our monotonic one; None while it has not said."""
        return ahead.ms if (ahead := self._ahead.get(owner)) is not None else None

    def _hear(self, owner: str, epoch: int, seq: int) -> None:
        """What is older than what is known may have been said long ago."""
        known = self._owners.get(owner)
        if known is None or (epoch, seq) >= (known.state.epoch, known.state.seq):
            self.heard_at[owner] = self._clock.monotonic()

    async def on_have(self, subject: str, payload: bytes) -> bytes | None:
        """Two nodes compare how far they know each owner; who knows less asks."""
        del subject
        theirs = self._holders.read_holdings(payload)
        if theirs is None:
            return None
        self._compare(theirs)
        return msgspec.json.encode(self._holders.holdings(ahead_of=theirs.owners))

    def _compare(self, theirs: Holdings) -> None:
        for owner, position in theirs.owners.items():
            known = self._owners.get(owner)
            mine = (known.state.epoch, known.state.seq) if known else (0, 0)
            if owner != self._own and tuple(position) > mine and self._keys(owner) is not None:
                self._ask(owner)
                self._holders.remember(owner, theirs.node)

    async def _gossip(self) -> None:
        """An owner that is away cannot beat: without this, who missed its last words would never know."""
        while True:
            await self._clock.tick(self._gossip_s)
            answer = await self._holders.exchange()
            if answer is not None:
                self._compare(answer)

    def _ask(self, owner: str, *, whole: bool = False) -> None:
        missing = self._missing.setdefault(owner, _Missing())
        missing.whole = missing.whole or whole
        missing.due_at = 0.0
        self._nudged.set()

    def _due(self) -> list[str]:
        now = self._clock.monotonic()
        return [owner for owner, missing in self._missing.items() if missing.due_at <= now]

    # -- what is asked for ---------------------------------------------------------------------------------------------

    async def catch_up(self, owner: str) -> bool:
        """Fetch what is missing of an owner, from itself or from who holds it; False when it has to be tried again."""
        missing = self._missing.setdefault(owner, _Missing())
        done = await self._from_owner(owner, whole=missing.whole)
        if done is None:
            done = await self._from_holders(owner, whole=missing.whole)
        if done:
            self._missing.pop(owner, None)
            return True
        pause_s = min(FETCH_PAUSE_S * 2**missing.rounds, FETCH_PAUSE_S_MAX)
        missing.rounds += 1
        missing.due_at = self._clock.monotonic() + pause_s
        if missing.rounds >= ROUNDS_MAX and self._missing.get(owner) is missing:
            self._missing.pop(owner)
        return False

    async def _from_owner(self, owner: str, *, whole: bool) -> bool | None:
        """None: it does not answer."""
        known = self._owners.get(owner)
        epoch, after = (0, 0) if known is None or whole else (known.state.epoch, known.state.seq)
        rows: list[OwnedRow] = []
        begun_at, proof = after, b""
        for number in range(CHUNKS_MAX):
            answer = await self._fetch(owner, epoch, after)
            if answer is None:
                return None if number == 0 else False
            frame, data = answer
            if frame.epoch != epoch:
                if frame.after_seq != 0:
                    return False
                epoch, begun_at, rows = frame.epoch, 0, []
            elif frame.after_seq > after:
                return False
            rows += frame.rows
            after = frame.seq
            if frame.last:
                proof = data if frame.digest and len(data) <= PROOF_BYTES_MAX else b""
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
            await self._apply(owner, epoch, after, rows, replace=replace, proof=proof)
        return True

    async def _fetch(self, owner: str, epoch: int, after: int) -> tuple[CatalogueFrame, bytes] | None:
        wanted = msgspec.json.encode(Fetch(owner=owner, epoch=epoch, after_seq=after))
        try:
            reply = await self._bus.request(frames.fetch_subject(owner), wanted, timeout_s=FETCH_TIMEOUT_S)
        except PantalaError as error:
            log.debug("owner does not answer", owner=owner, error=str(error))
            return None
        frame = frames.open_frame(reply, self._keys)
        if frame is None or frame.owner != owner:
            self.refused += 1
            return None
        return frame, reply

    async def _from_holders(self, owner: str, *, whole: bool) -> bool:
        for holder in self._holders.to_ask(owner, HOLDERS_ASKED_MAX):
            known = self._owners.get(owner)
            epoch, after = (0, 0) if known is None or whole else (known.state.epoch, known.state.seq)
            held = await self._holders.fetch(holder, owner, epoch, after)
            key = self._keys(owner)
            if held is None or key is None:
                continue
            proof = frames.open_proof(held.proof, self._keys)
            said = await anyio.to_thread.run_sync(frames.all_signed, key, owner, held.epoch, held.rows)
            if not said or proof is None or proof.owner != owner:
                self.refused += 1
                continue
            if await self._take_held(owner, held.epoch, held.rows, proof, held.proof, since=(epoch, after)):
                return True
        return False

    async def _take_held(
        self, owner: str, epoch: int, rows: list[OwnedRow], proof: Beat, data: bytes, *, since: tuple[int, int]
    ) -> bool:
        """Every row is the owner's word; whether none was left out shows in the owner's count and digest."""
        async with self._turn:
            known = self._owners.get(owner)
            at = (known.state.epoch, known.state.seq) if known else (0, 0)
            whole = since[1] == 0 or since[0] != epoch
            position = (proof.epoch, proof.seq)
            if proof.epoch != epoch or (known is None and not whole):
                return False
            if position < at or (position == at and not whole):
                return True  # what came meanwhile is newer
            after = Owned(OwnerState(epoch=epoch, seq=0))
            if not whole and known is not None:
                after.rows, after.digest = dict(known.rows), known.digest.copy()
            for row in rows:
                old = after.rows.get((row.stream, row.key))
                if row.seq <= proof.seq and (old is None or row.seq > old.seq):
                    after.take(row)
            if (after.digest.count, after.digest.text) != (proof.count, proof.digest):
                log.warning("what a holder has of an owner is not whole", owner=owner)
                return False
            fresh = [row for row in rows if row.seq <= proof.seq]
            await self._apply(owner, epoch, proof.seq, fresh, replace=whole, proof=data)
            return True

    async def _apply(
        self, owner: str, epoch: int, seq: int, rows: list[OwnedRow], *, replace: bool = False, proof: bytes = b""
    ) -> None:
        """The caller holds the turn. Rows older than what is known are left out: frames may overlap."""
        if self._keys(owner) is None:
            return  # its key went while the frame waited for its turn
        known = self._owners.get(owner)
        if known is None or replace:
            known = Owned(OwnerState(epoch=epoch, seq=0))
        fresh = [row for row in rows if (old := known.rows.get((row.stream, row.key))) is None or row.seq > old.seq]
        state = OwnerState(epoch=epoch, seq=max(seq, known.state.seq), proof=proof or known.state.proof)
        await self._store.apply(owner, state, fresh, at_ms=unix_ms(self._clock.now()), replace=replace)
        known.state = state
        for row in fresh:
            known.take(row)
        self._owners[owner] = known
        self._view.apply(owner, fresh, replace=replace)

    async def _send(self, subject: str, payload: bytes) -> None:
        try:
            await self._bus.publish(subject, payload)
        except PantalaError as error:
            log.debug("bus is silent", subject=subject, error=str(error))
