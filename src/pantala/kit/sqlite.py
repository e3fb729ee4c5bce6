"""A SQLite file that may lose its last moments in a power cut: one connection, in turns, on a worker thread.

For what can be rebuilt or spared (the catalogue's view, logs). The journal, which may lose nothing, opens its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from pantala.errors import InternalError
from pantala.kit.disk import disk_full, is_full

T = TypeVar("T")


class SqliteFile:
    """`name` is for the error's reader: `the catalogue`, `the log store`."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, name: str) -> None:
        self._connection = connection
        self._folder = folder
        self._name = name
        self._turn = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(1)

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, *, schema: str, name: str) -> AsyncGenerator[SqliteFile]:
        """`schema` is run each time, so its statements create only what is not there."""
        connection = await anyio.to_thread.run_sync(_connect, path, schema, name)
        try:
            yield cls(connection, path.parent, name)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(connection.close)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """One piece of work; an open transaction is rolled back when it fails. Raises DiskFull, InternalError."""

        def safely() -> T:
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if is_full(error, self._folder):
                    raise disk_full(self._name, self._folder) from error
                raise InternalError(f"{self._name} refused: {error}") from error

        async with self._turn:
            return await anyio.to_thread.run_sync(safely, limiter=self._limiter)


def _connect(path: Path, schema: str, name: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(schema)
        path.chmod(0o600)
    except BaseException as error:
        connection.close()
        if is_full(error, path.parent):
            raise disk_full(name, path.parent) from error
        raise
    return connection
