"""One database, reached only off the event loop: many readers, one writer.

Use cases hand `read` and `write` a function of a connection; `write` is one transaction, committed to disk when it
returns. Functions must not wait for anything but the database (no node call inside a transaction).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

from pantala.errors import InternalError, StoreBusy
from pantala.kit.disk import disk_full, is_full

T = TypeVar("T")

READERS_MAX = 4
BUSY_TIMEOUT_MS = 5_000


class Database:
    """Made by `open_database`; `close` releases every connection."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._readers = anyio.CapacityLimiter(READERS_MAX)
        self._writer = anyio.CapacityLimiter(1)

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await anyio.to_thread.run_sync(partial(self._run, work, write=False), limiter=self._readers)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Once begun it finishes, even when the caller is cancelled: what was committed is never half known."""
        return await anyio.to_thread.run_sync(partial(self._run, work, write=True), limiter=self._writer)

    def close(self) -> None:
        self._engine.dispose()

    def _run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        try:
            with self._engine.connect() as connection:
                connection = connection.execution_options(pantala_write=write)
                with connection.begin():
                    return work(connection)
        except OperationalError as error:
            if "locked" in str(error.orig) or "busy" in str(error.orig):
                raise StoreBusy("the database is busy; nothing was changed") from error
            if error.orig is not None and is_full(error.orig, self._folder):
                raise disk_full("the platform's database; nothing was changed", self._folder) from error
            raise InternalError(f"the database failed: {error.orig}") from error
        except DBAPIError as error:
            raise InternalError(f"the database refused a statement: {error.orig}") from error


def open_database(path: Path) -> Database:
    """The SQLite database at `path`, made and migrated to the newest schema."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = sqlite_engine(path)
    try:
        migrate(engine)
        path.chmod(0o600)
    except BaseException as error:
        engine.dispose()
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        if is_full(cause, path.parent):
            raise disk_full("the platform's database", path.parent) from error
        raise
    return Database(engine, path.parent)


def sqlite_engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", pool_size=READERS_MAX + 1, max_overflow=0)

    @event.listens_for(engine, "connect")
    def prepare(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
            dbapi_connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: upgrading a read lock later can fail without waiting.
        write = connection.get_execution_options().get("pantala_write", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
