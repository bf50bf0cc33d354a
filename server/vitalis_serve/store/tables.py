"""The schema of this version of the program; `migrations/` holds the way to it. SQLite and PostgreSQL alike.

Times are UTC, in whole Unix seconds. Lists are JSON arrays.
"""

from typing import Final

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

tenants: Final = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("status", String(16), nullable=False),  # active | disabled
    Column("notes", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

keys: Final = Table(
    "keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # hex SHA-256 of the whole key
    Column("class", String(16), nullable=False, key="class_"),
    Column("scopes", JSON, nullable=False),
    Column("routes", JSON, nullable=False),
    Column("notes", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=True),
    Column("revoked_at", BigInteger, nullable=True),
)

audit: Final = Table(
    "audit",
    metadata,
    # SQLite counts rows by itself only in a column that is declared INTEGER.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("who", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("origin", String(256), nullable=False),
    Column("details", JSON, nullable=False),
    Index("ix_audit_at", "at"),
)

# One row, id 1. `needs_program` is the oldest version of this program that understands the schema.
state: Final = Table(
    "state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("snapshot_version", BigInteger, nullable=False),
    Column("needs_program", String(32), nullable=False),
)
