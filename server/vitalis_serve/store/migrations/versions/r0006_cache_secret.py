"""The secret behind tenants' salts, for several gateways that share one store."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
needs_program = "0.2.0"


def upgrade() -> None:
    op.add_column("state", sa.Column("cache_secret", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("state", "cache_secret")
