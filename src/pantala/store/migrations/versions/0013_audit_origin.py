"""the audit log says from where and how it ended, and is read by org and trimmed by age"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("origin", sa.String(), nullable=False, server_default=""))
    op.add_column("audit", sa.Column("outcome", sa.String(), nullable=False, server_default="accepted"))
    op.create_index(op.f("ix_audit_org_id"), "audit", ["org_id", "id"])
    op.create_index(op.f("ix_audit_at_ms"), "audit", ["at_ms"])
