"""standby machines take over from machines of hosts that are lost"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "takeovers",
        sa.Column("standby_id", sa.String(), nullable=False),
        sa.Column("watched_id", sa.String(), nullable=False),
        sa.Column("since_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["standby_id"], ["placements.machine_id"], name=op.f("fk_takeovers_standby_id_placements")
        ),
        sa.ForeignKeyConstraint(
            ["watched_id"], ["placements.machine_id"], name=op.f("fk_takeovers_watched_id_placements")
        ),
        sa.PrimaryKeyConstraint("standby_id", name=op.f("pk_takeovers")),
    )
