"""`catalogue.db`: rows of every owner and how far each was read. Rebuildable, so not synced per row; only the block
of sequences that the owner of this host may use is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from pantala.kit.sqlite import SqliteFile
from pantala.wire.catalogue import OwnedRow

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS rows (
        owner TEXT NOT NULL,
        stream TEXT NOT NULL,
        key TEXT NOT NULL,
        seq INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        value BLOB,
        signature BLOB NOT NULL DEFAULT x'',
        PRIMARY KEY (owner, stream, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS rows_seq ON rows (owner, seq);
    CREATE TABLE IF NOT EXISTS owners (
        owner TEXT PRIMARY KEY,
        epoch INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        reserved INTEGER NOT NULL DEFAULT 0,
        proof BLOB NOT NULL DEFAULT x''
    ) STRICT, WITHOUT ROWID;
"""
_PUT = """
    INSERT INTO rows (owner, stream, key, seq, at_ms, value, signature) VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (owner, stream, key) DO UPDATE SET
        seq = excluded.seq, at_ms = excluded.at_ms, value = excluded.value, signature = excluded.signature
    WHERE excluded.seq > rows.seq
"""
_PUT_OWNER = """
    INSERT INTO owners (owner, epoch, seq, proof) VALUES (?, ?, ?, ?)
    ON CONFLICT (owner) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, proof = excluded.proof
"""
_CLEAR_OWNER = "DELETE FROM rows WHERE owner = ?"
_FORGET_OWNER = "DELETE FROM owners WHERE owner = ?"
_ALL = "SELECT owner, stream, key, seq, value, signature FROM rows ORDER BY owner, seq"
_OWNERS = "SELECT owner, epoch, seq, reserved, proof FROM owners"
_ADDED_COLUMNS = (("rows", "signature"), ("owners", "proof"))
_RESERVE = """
    INSERT INTO owners (owner, epoch, seq, reserved) VALUES (?, ?, ?, ?)
    ON CONFLICT (owner) DO UPDATE SET epoch = excluded.epoch, reserved = excluded.reserved
"""
_FORGET_TOMBSTONES = "DELETE FROM rows WHERE value IS NULL AND at_ms < ?"


class OwnerState(msgspec.Struct, frozen=True, kw_only=True):
    """`reserved`: sequences up to this one may have been used, also after a power cut; 0 for others' rows. `proof`: the
    owner's newest signed word on how far it is."""

    epoch: int
    seq: int
    reserved: int = 0
    proof: bytes = b""


class CatalogueStore:
    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncGenerator[CatalogueStore]:
        async with SqliteFile.open(path, schema=_SCHEMA, name="the catalogue's file") as file:
            await file.run(_add_columns)
            yield cls(file)

    async def load(self) -> tuple[dict[str, OwnerState], dict[str, list[OwnedRow]]]:
        """Everything, by owner; rows in order of their sequence."""

        def work(connection: sqlite3.Connection) -> tuple[dict[str, OwnerState], dict[str, list[OwnedRow]]]:
            owners = {
                row[0]: OwnerState(epoch=row[1], seq=row[2], reserved=row[3], proof=row[4])
                for row in connection.execute(_OWNERS)
            }
            rows: dict[str, list[OwnedRow]] = {}
            for owner, stream, key, seq, value, signature in connection.execute(_ALL):
                decoded = msgspec.json.decode(value) if value is not None else None
                row = OwnedRow(stream=stream, key=key, seq=seq, value=decoded, signature=signature)
                rows.setdefault(owner, []).append(row)
            return owners, rows

        return await self._file.run(work)

    async def apply(
        self, owner: str, state: OwnerState, rows: Sequence[OwnedRow], *, at_ms: int, replace: bool = False
    ) -> None:
        """Rows of an owner and how far it is read, in one transaction; `replace` drops what it had before."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            if replace:
                connection.execute(_CLEAR_OWNER, (owner,))
            connection.executemany(
                _PUT,
                [(owner, r.stream, r.key, r.seq, at_ms, _encoded(r), r.signature) for r in rows],
            )
            connection.execute(_PUT_OWNER, (owner, state.epoch, state.seq, state.proof))
            connection.execute("COMMIT")

        await self._file.run(work)

    async def forget_owner(self, owner: str) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_CLEAR_OWNER, (owner,))
            connection.execute(_FORGET_OWNER, (owner,))
            connection.execute("COMMIT")

        await self._file.run(work)

    async def reserve(self, owner: str, state: OwnerState) -> None:
        """On disk when it returns: sequences up to `state.reserved` are used up."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA synchronous = FULL")
            try:
                connection.execute(_RESERVE, (owner, state.epoch, state.seq, state.reserved))
            finally:
                connection.execute("PRAGMA synchronous = NORMAL")

        await self._file.run(work)

    async def forget_tombstones(self, before_ms: int) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute(_FORGET_TOMBSTONES, (before_ms,))

        await self._file.run(work)


def _encoded(row: OwnedRow) -> bytes | None:
    return None if row.value is None else msgspec.json.encode(row.value)


def _add_columns(connection: sqlite3.Connection) -> None:
    """To a file of an older version: whose used-up sequences must not be forgotten, although rows could be."""
    for table, column in _ADDED_COLUMNS:
        names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        if column not in names:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} BLOB NOT NULL DEFAULT x''")
