"""Keys: the secret before the last rotation and how long it opens, and when a key was used last."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
needs_program = "0.2.0"


def upgrade() -> None:
    op.add_column("keys", sa.Column("old_digest", sa.String(64), nullable=True))
    op.add_column("keys", sa.Column("old_until", sa.BigInteger, nullable=True))
    op.add_column("keys", sa.Column("last_used_at", sa.BigInteger, nullable=True))


def downgrade() -> None:
    op.drop_column("keys", "last_used_at")
    op.drop_column("keys", "old_until")
    op.drop_column("keys", "old_digest")
