"""apps have network policies"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "network_policies",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("app_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.id"], name=op.f("fk_network_policies_app_id_apps")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_network_policies")),
        sa.UniqueConstraint("app_id", "name", name=op.f("uq_network_policies_app_id_name")),
    )
