"""Tables of the control plane (SQLite now, Postgres when it grows). Times are Unix milliseconds.

What each table is the truth of, and which use case writes it: `control/README.md`. Changes go through a migration in
`migrations/versions` (expand, then contract); a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("email", String, nullable=False, unique=True),
    Column("password_hash", String, nullable=True),
    Column("created_at_ms", BigInteger, nullable=False),
)

orgs = Table(
    "orgs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("slug", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("cross_network_replays", Boolean, nullable=False, server_default=false()),
    sqlite_autoincrement=True,
)

# Orgs whose apps may replay requests to those of `org_id`.
replay_sources = Table(
    "replay_sources",
    metadata,
    Column("org_id", ForeignKey("orgs.id"), primary_key=True),
    Column("source_org_id", ForeignKey("orgs.id"), primary_key=True),
)

memberships = Table(
    "memberships",
    metadata,
    Column("org_id", ForeignKey("orgs.id"), primary_key=True),
    Column("user_id", ForeignKey("users.id"), primary_key=True),
    Column("role", String, nullable=False),
)

# A 6PN network id is never given twice, so rows stay when their last app is gone.
networks = Table(
    "networks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("org_id", ForeignKey("orgs.id"), nullable=False),
    Column("name", String, nullable=False),
    UniqueConstraint("org_id", "name"),
    sqlite_autoincrement=True,
)

apps = Table(
    "apps",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("org_id", ForeignKey("orgs.id"), nullable=False, index=True),
    Column("network_id", ForeignKey("networks.id"), nullable=False),
    Column("role", String, nullable=False),
    Column("status", String, nullable=False),
    Column("secrets_version", Integer, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("deleted_at_ms", BigInteger, nullable=True),
    sqlite_autoincrement=True,
)
_LIVE_APP = text("deleted_at_ms IS NULL")
Index("uq_apps_live_name", apps.c.name, unique=True, sqlite_where=_LIVE_APP, postgresql_where=_LIVE_APP)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String, primary_key=True),
    Column("digest", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("role", String, nullable=False),
    Column("org_id", ForeignKey("orgs.id"), nullable=True),
    Column("app_id", ForeignKey("apps.id"), nullable=True),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Column("revoked_at_ms", BigInteger, nullable=True),
)

secrets = Table(
    "secrets",
    metadata,
    Column("app_id", ForeignKey("apps.id"), primary_key=True),
    Column("name", String, primary_key=True),
    Column("sealed", Text, nullable=False),
    Column("digest", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

secret_deliveries = Table(
    "secret_deliveries",
    metadata,
    Column("app_id", ForeignKey("apps.id"), primary_key=True),
    Column("node", ForeignKey("nodes.id"), primary_key=True),
    Column("version", Integer, nullable=False),
)

# Keys that encrypt and sign for an app; `sealed` to the cluster key, as secrets are. `public_key`: base64, or empty.
secret_keys = Table(
    "secret_keys",
    metadata,
    Column("app_id", ForeignKey("apps.id"), primary_key=True),
    Column("name", String, primary_key=True),
    Column("type", String, nullable=False),
    Column("sealed", Text, nullable=False),
    Column("public_key", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

# `document`: selector and rules as JSON.
network_policies = Table(
    "network_policies",
    metadata,
    Column("id", String, primary_key=True),
    Column("app_id", ForeignKey("apps.id"), nullable=False),
    Column("name", String, nullable=False),
    Column("document", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    UniqueConstraint("app_id", "name"),
)

releases = Table(
    "releases",
    metadata,
    Column("id", String, primary_key=True),
    Column("app_id", ForeignKey("apps.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("status", String, nullable=False),
    Column("image", Text, nullable=False),
    Column("definition", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("strategy", String, nullable=False),
    Column("user", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("plan", Text, nullable=False),
    Column("cursor", Integer, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    UniqueConstraint("app_id", "version"),
)

# Rows stay for ever, so that no id is given twice. `status`: active, draining, lost, removed.
nodes = Table(
    "nodes",
    metadata,
    Column("id", String, primary_key=True),
    Column("region", String, nullable=False),
    Column("zone", String, nullable=False),
    Column("status", String, nullable=False),
    Column("sealing_key", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("address", String, nullable=False, server_default=""),
    Column("verify_key", String, nullable=False, server_default=""),
    Column("bus_key", String, nullable=False, server_default=""),
    Column("edge", Boolean, nullable=False, server_default=text("1")),
    Column("epoch", Integer, nullable=False, server_default=text("1")),
    Column("certificate_until_ms", BigInteger, nullable=False, server_default=text("0")),
)

# One-time tokens that hosts join with; `node` is who used it.
host_tokens = Table(
    "host_tokens",
    metadata,
    Column("id", String, primary_key=True),
    Column("digest", String, nullable=False, unique=True),
    Column("region", String, nullable=False),
    Column("made_by", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Column("used_at_ms", BigInteger, nullable=True),
    Column("node", ForeignKey("nodes.id"), nullable=True),
)

# The key that certificate keys are sealed to; the newest row is in use. The private half is sealed to the cluster key.
edge_keys = Table(
    "edge_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("public_key", String, nullable=False),
    Column("sealed_key", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# Written before a machine is dispatched. `phase`: placing (the node has not answered yet), placed, destroying,
# destroyed. `tombstone` is kept beside it because uniqueness and every reader ask only that.
placements = Table(
    "placements",
    metadata,
    Column("machine_id", String, primary_key=True),
    Column("app_id", ForeignKey("apps.id"), nullable=False, index=True),
    Column("name", String, nullable=False),
    Column("node", ForeignKey("nodes.id"), nullable=False, index=True),
    Column("region", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("phase", String, nullable=False),
    Column("tombstone", Boolean, nullable=False),
    Column("boot", String, nullable=False),
    Column("config", Text, nullable=False),
    Column("snapshot", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)
# What is counted each few seconds or for each creation is read from this index alone: rows hold whole configs.
Index("ix_placements_counts", placements.c.app_id, placements.c.tombstone, placements.c.node, placements.c.phase)
UNFINISHED = text("phase IN ('placing', 'destroying')")
"""Word for word in statements that are to use the index of the few that are."""
Index("ix_placements_unfinished", placements.c.updated_at_ms, sqlite_where=UNFINISHED, postgresql_where=UNFINISHED)
_LIVE_MACHINE = text("NOT tombstone")
Index(
    "uq_placements_live_name",
    placements.c.app_id,
    placements.c.name,
    unique=True,
    sqlite_where=_LIVE_MACHINE,
    postgresql_where=_LIVE_MACHINE,
)

# Machines on their way from one node to another; one row for each generation given out, until both ends have answered.
# `phase`: choose (no target yet), prepare (the target may have a copy, the source is the one that counts), publish (the
# target counts), fence (the source may still have a copy), undo (the target's copy must go).
moves = Table(
    "moves",
    metadata,
    Column("machine_id", ForeignKey("placements.machine_id"), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("source", ForeignKey("nodes.id"), nullable=False),
    Column("target", ForeignKey("nodes.id"), nullable=True),
    Column("phase", String, nullable=False),
    Column("launch", Boolean, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

# Standbys that are to be started because the host of the machine they watch is lost; until it is done.
takeovers = Table(
    "takeovers",
    metadata,
    Column("standby_id", ForeignKey("placements.machine_id"), primary_key=True),
    Column("watched_id", ForeignKey("placements.machine_id"), nullable=False),
    Column("since_ms", BigInteger, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("digest", String, nullable=False),
    Column("boot", String, nullable=False),
    Column("code", Integer, nullable=True),
    Column("sealed_answer", Text, nullable=True),
    Column("created_at_ms", BigInteger, nullable=False, index=True),
)

# `sealed_key`: to the edge key in use when it was sealed (`sealed_to`). `kept_key`: to the cluster key, so that a new
# edge key needs no new certificate; empty where one is issued at once. `source`: platform, acme, custom, challenge.
certificates = Table(
    "certificates",
    metadata,
    Column("name", String, primary_key=True),
    Column("names", Text, nullable=False),
    Column("chain_pem", Text, nullable=False),
    Column("sealed_key", Text, nullable=False),
    Column("sealed_to", String, nullable=False),
    Column("not_after_ms", BigInteger, nullable=False),
    Column("issued_at_ms", BigInteger, nullable=False),
    Column("hostname", String, nullable=False, server_default="", index=True),
    Column("source", String, nullable=False, server_default="platform"),
    Column("kept_key", Text, nullable=False, server_default=""),
    Column("alpn", String, nullable=False, server_default=""),
)

# Names that users brought. `validation` and `errors` are JSON of `wire/certificates.py`: what the last look at DNS and
# the last order came to. `look_at_ms`: when the reconciler looks next.
hostnames = Table(
    "hostnames",
    metadata,
    Column("hostname", String, primary_key=True),
    Column("app_id", ForeignKey("apps.id"), nullable=False, index=True),
    Column("created_at_ms", BigInteger, nullable=False, server_default=text("0")),
    Column("updated_at_ms", BigInteger, nullable=False, server_default=text("0")),
    Column("acme_requested", Boolean, nullable=False, server_default=text("0")),
    Column("validation", Text, nullable=False, server_default="{}"),
    Column("owned", Boolean, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("errors", Text, nullable=False, server_default="[]"),
    Column("failed_at_ms", BigInteger, nullable=False, server_default=text("0")),
    Column("look_at_ms", BigInteger, nullable=False, server_default=text("0"), index=True),
    Column("limited_until_ms", BigInteger, nullable=False, server_default=text("0")),
)

# An order at a certificate authority, one for a name at a time; `url` is empty until the authority has said it.
acme_orders = Table(
    "acme_orders",
    metadata,
    Column("hostname", ForeignKey("hostnames.hostname"), primary_key=True),
    Column("directory", String, nullable=False),
    Column("challenge", String, nullable=False),
    Column("url", String, nullable=False),
    Column("kept_key", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

# What edges answer to the authority. `kind`: http (name: token), dns (name: of the TXT record).
acme_answers = Table(
    "acme_answers",
    metadata,
    Column("hostname", ForeignKey("hostnames.hostname"), nullable=False, index=True),
    Column("kind", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("value", String, primary_key=True),
)

acme_accounts = Table(
    "acme_accounts",
    metadata,
    Column("directory", String, primary_key=True),
    Column("url", String, nullable=False),
    Column("kept_key", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

ticket_keys = Table(
    "ticket_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kept_key", Text, nullable=False),
    Column("sealed_key", Text, nullable=False),
    Column("sealed_to", String, nullable=False),
    Column("not_before_ms", BigInteger, nullable=False),
    Column("not_after_ms", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# Addresses of one app: v4, v6, private_v6. Rows stay when an address is released (`app_id` empty), so that it is not
# given out again at once.
addresses = Table(
    "addresses",
    metadata,
    Column("address", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("app_id", ForeignKey("apps.id"), nullable=True, index=True),
    Column("network_id", Integer, nullable=True),
    Column("created_at_ms", BigInteger, nullable=False, server_default=text("0")),
    Column("released_at_ms", BigInteger, nullable=True),
)

shared_addresses = Table(
    "shared_addresses",
    metadata,
    Column("app_id", ForeignKey("apps.id"), primary_key=True),
    Column("address", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("org_id", Integer, nullable=True),
    Column("action", String, nullable=False),
    Column("target", String, nullable=False),
    Column("detail", Text, nullable=False),
    Column("request_id", String, nullable=False),
    Column("origin", String, nullable=False, server_default=text("''")),
    Column("outcome", String, nullable=False, server_default=text("'accepted'")),
    Index("ix_audit_org_id", "org_id", "id"),
    Index("ix_audit_at_ms", "at_ms"),
    sqlite_autoincrement=True,
)

publisher_lease = Table(
    "publisher_lease",
    metadata,
    Column("name", String, primary_key=True),
    Column("holder", String, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
)
