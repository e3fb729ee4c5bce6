"""orgs say whose replays reach their apps"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("orgs", sa.Column("cross_network_replays", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "replay_sources",
        sa.Column("org_id", sa.Integer(), nullable=False),
        sa.Column("source_org_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_replay_sources_org_id_orgs")),
        sa.ForeignKeyConstraint(["source_org_id"], ["orgs.id"], name=op.f("fk_replay_sources_source_org_id_orgs")),
        sa.PrimaryKeyConstraint("org_id", "source_org_id", name=op.f("pk_replay_sources")),
    )
