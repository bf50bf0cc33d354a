"""Alembic's environment. `versions/` holds one module a step; each says by `needs_program` which version of
this program is the oldest to understand the schema it makes. A step keeps the data of the tables it touches,
up and down, and leaves a schema with which the version before it can still serve during an upgrade."""
