"""The journal: one SQLite file (WAL, `synchronous=FULL`), written by one thread at a time, spoken to with `await`.

What is pending when the thread becomes free is committed in one transaction (group commit), each change under a
savepoint of its own, so that a refused one does not take its neighbours along. `commit` returns once it is on disk,
or, of wakes and of the steps that bring a machine up (`Change.in_haste`), once it is written.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec
from msgspec.structs import replace

from pantala.errors import InternalError, StoreBusy
from pantala.journal import schema
from pantala.journal.records import MachineRecord, Version
from pantala.kit.disk import disk_full, is_full
from pantala.wire.machine import Event
from pantala.wire.node import SealedSecrets

T = TypeVar("T")
_RECORD = msgspec.json.Decoder(MachineRecord)
_EVENT = msgspec.json.Decoder(Event)

EVENTS_KEPT = 200
VERSIONS_KEPT = 50
PENDING_MAX = 10_000


class Step(msgspec.Struct, frozen=True):
    """Something being done to a machine: written before it begins, removed once it is done."""

    machine: str
    kind: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What goes to disk together: a machine's record, its history, steps, and the outcome of the request. `versions`:
    those of the machine that are new or were changed; the last ones are kept, also when they are replaced. `fence`:
    copies of a machine below that generation never run here again. `in_haste`: nobody was promised anything:
    it is written and outlives this process, but the disk is not waited for. A power cut may undo it, which ends what it
    was about (processes, namespaces, mounts) too; the next change that is not in haste takes it along to the disk."""

    machine: MachineRecord | None = None
    events: tuple[Event, ...] = ()
    versions: tuple[Version, ...] = ()
    begin: Step | None = None
    end: tuple[Step, ...] = ()
    outcome: tuple[str, bytes] | None = None
    secrets: SealedSecrets | None = None
    fence: tuple[str, int] | None = None
    in_haste: bool = False
    at_ms: int = 0


class _Pending:
    __slots__ = ("change", "done", "error")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.done = False
        self.error: Exception | None = None


class Journal:
    """Made by `Journal.open`. Reads and writes take turns on one connection."""

    def __init__(self, connection: sqlite3.Connection, folder: Path) -> None:
        self._connection = connection
        self._folder = folder
        self._turn = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self._pending: list[_Pending] = []
        self._secrets: dict[str, SealedSecrets | None] = {}
        self.commits = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncGenerator[Journal]:
        connection = await anyio.to_thread.run_sync(_connect, path)
        try:
            yield cls(connection, path.parent)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(connection.close)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def commit(self, change: Change) -> None:
        """On disk when it returns. Raises StoreBusy when too much waits, DiskFull, InternalError when SQLite
        refuses; nothing of it is written then."""
        if len(self._pending) >= PENDING_MAX:
            raise StoreBusy("the journal is behind with its writes")
        mine = _Pending(change)
        if change.in_haste and not self._pending and not self._turn.locked():
            # A request waits for it, no disk is waited for, and a thread would hear of it later than it takes.
            self._write([mine])
            self.commits += 1
        else:
            await self._in_turn(mine)
        if mine.error is not None:
            if is_full(mine.error, self._folder):
                raise disk_full("the journal of this host", self._folder) from mine.error
            raise InternalError(f"the journal refused a change: {mine.error}") from mine.error

    async def _in_turn(self, mine: _Pending) -> None:
        self._pending.append(mine)
        try:
            async with self._turn:
                if not mine.done:
                    batch, self._pending = self._pending, []
                    with anyio.CancelScope(shield=True):  # others wait for what is in it, whatever happens to this task
                        await anyio.to_thread.run_sync(self._write, batch, limiter=self._limiter)
                    self.commits += 1
        finally:
            if not mine.done and mine in self._pending:
                self._pending.remove(mine)  # cancelled before its turn: nothing of it is written

    def _write(self, batch: list[_Pending]) -> None:
        connection = self._connection
        in_haste = all(item.change.in_haste for item in batch)
        try:
            if in_haste:
                for pragma in schema.IN_HASTE:
                    connection.execute(pragma).fetchall()
            connection.execute("BEGIN IMMEDIATE")
            for item in batch:
                connection.execute("SAVEPOINT change")
                try:
                    _apply(connection, item.change)
                except (sqlite3.IntegrityError, sqlite3.DataError) as error:
                    item.error = error
                    connection.execute("ROLLBACK TO change")
                connection.execute("RELEASE change")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for item in batch:
                item.error = error
        finally:
            for item in batch:
                if item.change.secrets is not None:
                    self._secrets.pop(item.change.secrets.app, None)
                item.done = True
            if in_haste:
                for pragma in schema.AT_LEISURE:
                    connection.execute(pragma).fetchall()

    async def forget(self, *, outcomes_before_ms: int, destroyed_before_ms: int, fences_before_ms: int = 0) -> None:
        """Drop what is kept for a time only."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(schema.FORGET_OUTCOMES, (outcomes_before_ms,))
            connection.execute(schema.FORGET_DESTROYED, (destroyed_before_ms,))
            connection.execute(schema.FORGET_FENCES, (fences_before_ms,))
            connection.execute(schema.FORGET_EVENTS)
            connection.execute(schema.FORGET_VERSIONS)
            connection.execute(schema.FORGET_SECRETS)
            connection.execute("COMMIT")
            self._secrets.clear()

        await self._run(work)

    # -- reading ---------------------------------------------------------------------------------------------------

    async def live(self) -> list[MachineRecord]:
        """Every machine that is not destroyed."""
        return await self._run(lambda c: [_record(row[0]) for row in c.execute(schema.LIVE_MACHINES)])

    async def find(self, machine_id: str) -> MachineRecord | None:
        """Also one that was destroyed within the time they are kept."""

        def work(connection: sqlite3.Connection) -> MachineRecord | None:
            row = connection.execute(schema.GET_MACHINE, (machine_id,)).fetchone()
            return _record(row[0]) if row else None

        return await self._run(work)

    async def destroyed(self, app: str | None = None, limit: int = 1000) -> list[MachineRecord]:
        """Of one app, or of all; the newest, as long as they are kept."""
        statement, given = (
            (schema.DESTROYED_MACHINES, (limit,)) if app is None else (schema.DESTROYED_OF_APP, (app, limit))
        )
        return await self._run(lambda c: [_record(row[0]) for row in c.execute(statement, given)])

    async def events_of(self, machine_ids: Sequence[str], limit: int = EVENTS_KEPT) -> dict[str, list[Event]]:
        """Of each machine, newest first, in one turn."""

        def work(connection: sqlite3.Connection) -> dict[str, list[Event]]:
            return {machine_id: _events(connection, machine_id, limit) for machine_id in machine_ids}

        return await self._run(work)

    async def events(self, machine_id: str, limit: int = EVENTS_KEPT) -> list[Event]:
        """Newest first."""
        return await self._run(lambda c: _events(c, machine_id, limit))

    async def versions(self, machine_id: str) -> list[Version]:
        """Newest first; of those that are kept."""

        def work(connection: sqlite3.Connection) -> list[Version]:
            rows = connection.execute(schema.VERSIONS, (machine_id,))
            return [msgspec.json.decode(row[0], type=Version) for row in rows]

        return await self._run(work)

    async def open_steps(self) -> list[Step]:
        """What had begun and was not finished."""
        return await self._run(lambda c: [Step(row[0], row[1]) for row in c.execute(schema.OPEN_STEPS)])

    async def outcome(self, request_id: str) -> bytes | None:
        def work(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute(schema.GET_OUTCOME, (request_id,)).fetchone()
            return bytes(row[0]) if row else None

        return await self._run(work)

    async def fences(self) -> dict[str, int]:
        """By machine the generation below which nothing runs here; names with a slash are the host's own marks."""
        return await self._run(lambda c: {row[0]: row[1] for row in c.execute(schema.FENCES)})

    async def secrets(self, app: str) -> SealedSecrets | None:
        """Sealed as they came. Kept at hand once read: each start needs them, and requests wait for starts."""

        def work(connection: sqlite3.Connection) -> SealedSecrets | None:
            row = connection.execute(schema.GET_SECRETS, (app,)).fetchone()
            self._secrets[app] = found = SealedSecrets(app=app, version=row[0], sealed=row[1]) if row else None
            return found

        return self._secrets[app] if app in self._secrets else await self._run(work)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        async with self._turn:
            return await anyio.to_thread.run_sync(work, self._connection, limiter=self._limiter)


def _record(doc: Any) -> MachineRecord:
    return _RECORD.decode(doc)


def _events(connection: sqlite3.Connection, machine_id: str, limit: int) -> list[Event]:
    return [_EVENT.decode(row[0]) for row in connection.execute(schema.EVENTS, (machine_id, limit))]


def _apply(connection: sqlite3.Connection, change: Change) -> None:
    if change.machine is not None:
        record = change.machine
        connection.execute(
            schema.PUT_MACHINE,
            {
                "id": record.id,
                "app": record.app.name,
                "state": str(record.state),
                "slot": record.slot,
                "destroyed_at_ms": record.destroyed_at_ms,
                "doc": msgspec.json.encode(record),
            },
        )
        for event in change.events:
            connection.execute(schema.ADD_EVENT, (record.id, event.id, msgspec.json.encode(event)))
        if change.events:
            connection.execute(schema.TRIM_EVENTS, {"machine": record.id, "keep": EVENTS_KEPT})
        for version in change.versions:
            kept = replace(version, pull_token="")
            connection.execute(schema.PUT_VERSION, (record.id, version.instance_id, msgspec.json.encode(kept)))
        if change.versions:
            connection.execute(schema.TRIM_VERSIONS, {"machine": record.id, "keep": VERSIONS_KEPT})
    if change.begin is not None:
        connection.execute(schema.BEGIN_STEP, (change.begin.machine, change.begin.kind, change.at_ms))
    for step in change.end:
        connection.execute(schema.END_STEP, (step.machine, step.kind))
    if change.secrets is not None:
        connection.execute(schema.PUT_SECRETS, (change.secrets.app, change.secrets.version, change.secrets.sealed))
    if change.fence is not None:
        connection.execute(schema.PUT_FENCE, (*change.fence, change.at_ms))
    if change.outcome is not None:
        connection.execute(schema.PUT_OUTCOME, (change.outcome[0], change.at_ms, change.outcome[1]))


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        for pragma in schema.PRAGMAS:
            connection.execute(pragma).fetchall()
        _migrate(connection, path)
        path.chmod(0o600)
    except BaseException as error:
        connection.close()
        if is_full(error, path.parent):
            raise disk_full("the journal of this host", path.parent) from error
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(schema.MIGRATIONS):
        raise InternalError(
            f"{path} was written by a newer Pantala (schema {version}, this one knows {len(schema.MIGRATIONS)})"
        )
    for number, migration in enumerate(schema.MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {migration} PRAGMA user_version = {number}; COMMIT;")
