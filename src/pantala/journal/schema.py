"""The journal's SQL, every statement with a name. Additive changes get a new entry in `MIGRATIONS`."""

from __future__ import annotations

MIGRATIONS = (
    """
    CREATE TABLE machines (
        id TEXT PRIMARY KEY,
        app TEXT NOT NULL,
        state TEXT NOT NULL,
        slot INTEGER NOT NULL,
        destroyed_at_ms INTEGER NOT NULL,
        doc BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX machines_slot ON machines (slot) WHERE destroyed_at_ms = 0;
    CREATE INDEX machines_app ON machines (app);
    CREATE TABLE steps (
        machine TEXT NOT NULL,
        kind TEXT NOT NULL,
        begun_at_ms INTEGER NOT NULL,
        PRIMARY KEY (machine, kind)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        machine TEXT NOT NULL,
        id TEXT NOT NULL,
        doc BLOB NOT NULL
    ) STRICT;
    CREATE INDEX events_machine ON events (machine, seq);
    CREATE TABLE outcomes (
        request_id TEXT PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        reply BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX outcomes_at ON outcomes (at_ms);
    CREATE TABLE secrets (
        app TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        sealed TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE fences (
        name TEXT PRIMARY KEY,
        generation INTEGER NOT NULL,
        at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE versions (
        machine TEXT NOT NULL,
        instance_id TEXT NOT NULL,
        doc BLOB NOT NULL,
        PRIMARY KEY (machine, instance_id)
    ) STRICT, WITHOUT ROWID;
    """,
)

PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA busy_timeout = 5000",
    "PRAGMA foreign_keys = ON",
)

CHECKPOINT_PAGES = 1000
IN_HASTE = ("PRAGMA synchronous = NORMAL", "PRAGMA wal_autocheckpoint = 0")
"""Neither the disk nor a checkpoint is waited for."""
AT_LEISURE = ("PRAGMA synchronous = FULL", f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")

PUT_MACHINE = """
    INSERT INTO machines (id, app, state, slot, destroyed_at_ms, doc)
    VALUES (:id, :app, :state, :slot, :destroyed_at_ms, :doc)
    ON CONFLICT (id) DO UPDATE SET
        app = excluded.app, state = excluded.state, slot = excluded.slot,
        destroyed_at_ms = excluded.destroyed_at_ms, doc = excluded.doc
"""
LIVE_MACHINES = "SELECT doc FROM machines WHERE destroyed_at_ms = 0 ORDER BY id"
GET_MACHINE = "SELECT doc FROM machines WHERE id = ?"
DESTROYED_MACHINES = "SELECT doc FROM machines WHERE destroyed_at_ms > 0 ORDER BY destroyed_at_ms DESC LIMIT ?"
DESTROYED_OF_APP = """
    SELECT doc FROM machines WHERE app = ? AND destroyed_at_ms > 0 ORDER BY destroyed_at_ms DESC LIMIT ?
"""
FORGET_DESTROYED = "DELETE FROM machines WHERE destroyed_at_ms > 0 AND destroyed_at_ms < ?"
FORGET_EVENTS = "DELETE FROM events WHERE machine NOT IN (SELECT id FROM machines)"

BEGIN_STEP = """
    INSERT INTO steps (machine, kind, begun_at_ms) VALUES (?, ?, ?)
    ON CONFLICT (machine, kind) DO UPDATE SET begun_at_ms = excluded.begun_at_ms
"""
END_STEP = "DELETE FROM steps WHERE machine = ? AND kind = ?"
OPEN_STEPS = "SELECT machine, kind, begun_at_ms FROM steps ORDER BY begun_at_ms"

ADD_EVENT = "INSERT INTO events (machine, id, doc) VALUES (?, ?, ?)"
TRIM_EVENTS = """
    DELETE FROM events WHERE machine = :machine AND seq <= (
        SELECT seq FROM events WHERE machine = :machine ORDER BY seq DESC LIMIT 1 OFFSET :keep
    )
"""
EVENTS = "SELECT doc FROM events WHERE machine = ? ORDER BY seq DESC LIMIT ?"

PUT_VERSION = """
    INSERT INTO versions (machine, instance_id, doc) VALUES (?, ?, ?)
    ON CONFLICT (machine, instance_id) DO UPDATE SET doc = excluded.doc
"""
TRIM_VERSIONS = """
    DELETE FROM versions WHERE machine = :machine AND instance_id <= (
        SELECT instance_id FROM versions WHERE machine = :machine ORDER BY instance_id DESC LIMIT 1 OFFSET :keep
    )
"""
VERSIONS = "SELECT doc FROM versions WHERE machine = ? ORDER BY instance_id DESC"
FORGET_VERSIONS = "DELETE FROM versions WHERE machine NOT IN (SELECT id FROM machines)"

PUT_OUTCOME = "INSERT OR IGNORE INTO outcomes (request_id, at_ms, reply) VALUES (?, ?, ?)"
GET_OUTCOME = "SELECT reply FROM outcomes WHERE request_id = ?"
FORGET_OUTCOMES = "DELETE FROM outcomes WHERE at_ms < ?"

PUT_SECRETS = """
    INSERT INTO secrets (app, version, sealed) VALUES (?, ?, ?)
    ON CONFLICT (app) DO UPDATE SET version = excluded.version, sealed = excluded.sealed
    WHERE excluded.version >= secrets.version
"""
GET_SECRETS = "SELECT version, sealed FROM secrets WHERE app = ?"
FORGET_SECRETS = "DELETE FROM secrets WHERE app NOT IN (SELECT app FROM machines WHERE destroyed_at_ms = 0)"

PUT_FENCE = """
    INSERT INTO fences (name, generation, at_ms) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET generation = max(generation, excluded.generation), at_ms = excluded.at_ms
"""
FENCES = "SELECT name, generation FROM fences"
FORGET_FENCES = "DELETE FROM fences WHERE at_ms < ? AND name NOT LIKE '%/%'"
