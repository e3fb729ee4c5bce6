"""certificates for users' host names, addresses from pools, ticket keys"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _hostnames()
    op.add_column("certificates", sa.Column("hostname", sa.String(), nullable=False, server_default=""))
    op.add_column("certificates", sa.Column("source", sa.String(), nullable=False, server_default="platform"))
    op.add_column("certificates", sa.Column("kept_key", sa.Text(), nullable=False, server_default=""))
    op.add_column("certificates", sa.Column("alpn", sa.String(), nullable=False, server_default=""))
    op.create_index(op.f("ix_certificates_hostname"), "certificates", ["hostname"])
    op.create_table(
        "ticket_keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kept_key", sa.Text(), nullable=False),
        sa.Column("sealed_key", sa.Text(), nullable=False),
        sa.Column("sealed_to", sa.String(), nullable=False),
        sa.Column("not_before_ms", sa.BigInteger(), nullable=False),
        sa.Column("not_after_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ticket_keys")),
        sqlite_autoincrement=True,
    )
    op.add_column("addresses", sa.Column("network_id", sa.Integer(), nullable=True))
    op.add_column("addresses", sa.Column("created_at_ms", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("addresses", sa.Column("released_at_ms", sa.BigInteger(), nullable=True))
    op.create_table(
        "shared_addresses",
        sa.Column("app_id", sa.Integer(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.id"], name=op.f("fk_shared_addresses_app_id_apps")),
        sa.PrimaryKeyConstraint("app_id", name=op.f("pk_shared_addresses")),
    )


def _hostnames() -> None:
    for column in (
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("acme_requested", sa.Boolean(), nullable=False, server_default="0"),
        sa.Column("validation", sa.Text(), nullable=False, server_default="{}"),
        sa.Column("owned", sa.Boolean(), nullable=False, server_default="0"),
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("errors", sa.Text(), nullable=False, server_default="[]"),
        sa.Column("failed_at_ms", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("look_at_ms", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("limited_until_ms", sa.BigInteger(), nullable=False, server_default="0"),
    ):
        op.add_column("hostnames", column)
    op.create_index(op.f("ix_hostnames_look_at_ms"), "hostnames", ["look_at_ms"])
    op.create_table(
        "acme_orders",
        sa.Column("hostname", sa.String(), nullable=False),
        sa.Column("directory", sa.String(), nullable=False),
        sa.Column("challenge", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("kept_key", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["hostname"], ["hostnames.hostname"], name=op.f("fk_acme_orders_hostname_hostnames")),
        sa.PrimaryKeyConstraint("hostname", name=op.f("pk_acme_orders")),
    )
    op.create_table(
        "acme_answers",
        sa.Column("hostname", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["hostname"], ["hostnames.hostname"], name=op.f("fk_acme_answers_hostname_hostnames")),
        sa.PrimaryKeyConstraint("kind", "name", "value", name=op.f("pk_acme_answers")),
    )
    op.create_index(op.f("ix_acme_answers_hostname"), "acme_answers", ["hostname"])
    op.create_table(
        "acme_accounts",
        sa.Column("directory", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("kept_key", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("directory", name=op.f("pk_acme_accounts")),
    )
