"""Limits of keys, tenants and routes."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
needs_program = "0.2.0"


def upgrade() -> None:
    op.create_table(
        "rates",
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger, nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger, nullable=True),
        sa.Column("concurrent", sa.BigInteger, nullable=True),
        sa.Column("tokens_per_day", sa.BigInteger, nullable=True),
        sa.Column("tokens_per_month", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_rates"),
    )


def downgrade() -> None:
    op.drop_table("rates")
