"""machines move: from a host that is drained or lost to another"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "moves",
        sa.Column("machine_id", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=True),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("launch", sa.Boolean(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["machine_id"], ["placements.machine_id"], name=op.f("fk_moves_machine_id_placements")),
        sa.ForeignKeyConstraint(["source"], ["nodes.id"], name=op.f("fk_moves_source_nodes")),
        sa.ForeignKeyConstraint(["target"], ["nodes.id"], name=op.f("fk_moves_target_nodes")),
        sa.PrimaryKeyConstraint("machine_id", "generation", name=op.f("pk_moves")),
    )
