"""hosts join by themselves: what a node joined with, one-time tokens, the edge key"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("address", "verify_key", "bus_key"):
        op.add_column("nodes", sa.Column(name, sa.String(), nullable=False, server_default=""))
    op.add_column("nodes", sa.Column("edge", sa.Boolean(), nullable=False, server_default=sa.text("1")))
    op.add_column("nodes", sa.Column("epoch", sa.Integer(), nullable=False, server_default=sa.text("1")))
    op.add_column(
        "nodes", sa.Column("certificate_until_ms", sa.BigInteger(), nullable=False, server_default=sa.text("0"))
    )
    op.create_table(
        "host_tokens",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("region", sa.String(), nullable=False),
        sa.Column("made_by", sa.String(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("used_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("node", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["node"], ["nodes.id"], name=op.f("fk_host_tokens_node_nodes")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_host_tokens_digest")),
    )
    op.create_table(
        "edge_keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("public_key", sa.String(), nullable=False),
        sa.Column("sealed_key", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_edge_keys")),
        sqlite_autoincrement=True,
    )
