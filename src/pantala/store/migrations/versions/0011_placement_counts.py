"""placements are counted, and the unfinished ones found, without reading all rows"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0009"
branch_labels = None
depends_on = None

UNFINISHED = sa.text("phase IN ('placing', 'destroying')")


def upgrade() -> None:
    op.create_index("ix_placements_counts", "placements", ["app_id", "tombstone", "node", "phase"])
    op.create_index(
        "ix_placements_unfinished",
        "placements",
        ["updated_at_ms"],
        sqlite_where=UNFINISHED,
        postgresql_where=UNFINISHED,
    )
