"""The schema of this version of the program; `migrations/` holds the way to it. SQLite and PostgreSQL alike.

Times are UTC, in whole Unix seconds where the name does not end in `_ms`; a day is the number of days since
1970-01-01. Lists are JSON arrays. What others name (routes, models, request ids) is Text: PostgreSQL refuses a longer
value than a column's, and a record that cannot be stored would be kept waiting for ever.
"""

from typing import Final

from sqlalchemy import JSON, BigInteger, Boolean, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

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
    Column("old_digest", String(64), nullable=True),  # of the secret before the last rotation: it opens too,
    Column("old_until", BigInteger, nullable=True),  # until this time
    Column("last_used_at", BigInteger, nullable=True),
)

# Limits: of a key (by id), a tenant or a route (by name). NULL: none of that kind.
rates: Final = Table(
    "rates",
    metadata,
    Column("kind", String(16), primary_key=True),  # key | tenant | route
    Column("name", Text, primary_key=True),
    Column("requests_per_minute", BigInteger, nullable=True),
    Column("tokens_per_minute", BigInteger, nullable=True),
    Column("concurrent", BigInteger, nullable=True),
    Column("tokens_per_day", BigInteger, nullable=True),
    Column("tokens_per_month", BigInteger, nullable=True),
)

# One row a finished request, once: `id` is ours (hex), not the caller's.
usage: Final = Table(
    "usage",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("began_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("day", Integer, nullable=False),  # of ended_ms
    Column("tenant", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("api", Text, nullable=False),
    Column("class", Text, nullable=False, key="class_"),
    Column("request_id", Text, nullable=False),  # the caller's, or made for it
    Column("stream", Boolean, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("code", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),  # among the prompt's
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),  # among the completion's
    Column("prompt_estimated", Boolean, nullable=False),
    Column("completion_estimated", Boolean, nullable=False),
    Index("ix_usage_day", "day", "tenant"),
    Index("ix_usage_ended", "ended_ms"),
)

# Sums over `usage`, kept when its rows are gone.
usage_daily: Final = Table(
    "usage_daily",
    metadata,
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
)

# Up to which byte the records of a spool file are in `usage`.
spool_files: Final = Table(
    "spool_files",
    metadata,
    Column("name", Text, primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
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
    Column("cache_secret", Text, nullable=True),  # what tenants' salts are made from, the same for all gateways
)
