"""Lines of the machines of this host in `logs.db`: bounded per app by lines and age. Loses at most what a power cut
takes (not synced per line); how far each machine was read is kept in the same transaction as its lines.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from pantala.kit.sqlite import SqliteFile

LINES_PER_APP_MAX = 100_000
KEEP_S = 7 * 24 * 3600
TRIM_EVERY = 2_000

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS lines (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        app TEXT NOT NULL,
        machine TEXT NOT NULL,
        at_ns INTEGER NOT NULL,
        provider TEXT NOT NULL,
        level TEXT NOT NULL,
        message TEXT NOT NULL
    ) STRICT;
    CREATE INDEX IF NOT EXISTS lines_app ON lines (app, at_ns);
    CREATE TABLE IF NOT EXISTS positions (
        machine TEXT NOT NULL,
        instance TEXT NOT NULL,
        position INTEGER NOT NULL,
        PRIMARY KEY (machine, instance)
    ) STRICT, WITHOUT ROWID;
"""
_ADD = "INSERT INTO lines (app, machine, at_ns, provider, level, message) VALUES (?, ?, ?, ?, ?, ?)"
_PUT_POSITION = """
    INSERT INTO positions (machine, instance, position) VALUES (?, ?, ?)
    ON CONFLICT (machine, instance) DO UPDATE SET position = excluded.position
"""
_DROP_POSITION = "DELETE FROM positions WHERE machine = ? AND instance = ?"
_GET_POSITION = "SELECT position FROM positions WHERE machine = ? AND instance = ?"
_NEWEST = """
    SELECT at_ns, machine, provider, level, message FROM (
        SELECT seq, at_ns, machine, provider, level, message FROM lines
        WHERE app = :app AND at_ns > :since AND (:machine IS NULL OR machine = :machine)
        ORDER BY at_ns DESC, seq DESC LIMIT :limit
    ) ORDER BY at_ns, seq
"""
_NEXT = """
    SELECT at_ns, machine, provider, level, message FROM lines
    WHERE app = :app AND at_ns > :since AND (:machine IS NULL OR machine = :machine)
    ORDER BY at_ns, seq LIMIT :limit
"""
_FORGET_OLD = "DELETE FROM lines WHERE at_ns < ?"
_APPS = "SELECT app, count(*) FROM lines GROUP BY app HAVING count(*) > ?"
_TRIM_APP = """
    DELETE FROM lines WHERE app = :app AND seq <= (
        SELECT seq FROM lines WHERE app = :app ORDER BY seq DESC LIMIT 1 OFFSET :keep
    )
"""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """`provider`: app, runner (the platform) or proxy."""

    app: str
    machine: str
    at_ns: int
    provider: str
    level: str
    message: str


class LogStore:
    def __init__(self, file: SqliteFile, *, lines_per_app_max: int, keep_s: float) -> None:
        self._file = file
        self._lines_per_app_max = lines_per_app_max
        self._keep_ns = int(keep_s * 1e9)
        self._since_trim = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: Path, *, lines_per_app_max: int = LINES_PER_APP_MAX, keep_s: float = KEEP_S
    ) -> AsyncGenerator[LogStore]:
        async with SqliteFile.open(path, schema=_SCHEMA, name="the log store") as file:
            yield cls(file, lines_per_app_max=lines_per_app_max, keep_s=keep_s)

    async def add(self, lines: Sequence[Line], *, position: tuple[str, str, int] | None = None) -> None:
        """Keep lines and how far their machine was read (machine, instance, position), in one transaction."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_ADD, [(x.app, x.machine, x.at_ns, x.provider, x.level, x.message) for x in lines])
            if position is not None:
                connection.execute(_PUT_POSITION, position)
            self._since_trim += len(lines)
            if self._since_trim >= TRIM_EVERY and lines:
                self._since_trim = 0
                self._trim(connection, lines[-1].at_ns)
            connection.execute("COMMIT")

        await self._file.run(work)

    async def position(self, machine: str, instance: str) -> int:
        def work(connection: sqlite3.Connection) -> int:
            row = connection.execute(_GET_POSITION, (machine, instance)).fetchone()
            return int(row[0]) if row else 0

        return await self._file.run(work)

    async def forget_position(self, machine: str, instance: str) -> None:
        """The ring it counted in is gone."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(_DROP_POSITION, (machine, instance))

        await self._file.run(work)

    async def read(self, app: str, *, machine: str | None, since_ns: int, limit: int) -> list[Line]:
        """In order of time: without `since_ns` the newest `limit` lines, with it the first ones after it, so that a
        reader who continues from the last one misses none."""

        def work(connection: sqlite3.Connection) -> list[Line]:
            given = {"app": app, "machine": machine, "since": since_ns, "limit": limit}
            rows = connection.execute(_NEXT if since_ns else _NEWEST, given)
            return [Line(app=app, at_ns=r[0], machine=r[1], provider=r[2], level=r[3], message=r[4]) for r in rows]

        return await self._file.run(work)

    async def trim(self, now_ns: int) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            self._trim(connection, now_ns)
            connection.execute("COMMIT")

        await self._file.run(work)

    def _trim(self, connection: sqlite3.Connection, now_ns: int) -> None:
        connection.execute(_FORGET_OLD, (now_ns - self._keep_ns,))
        for app, _ in connection.execute(_APPS, (self._lines_per_app_max,)).fetchall():
            connection.execute(_TRIM_APP, {"app": app, "keep": self._lines_per_app_max})
