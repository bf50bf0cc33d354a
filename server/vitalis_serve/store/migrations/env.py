"""Run by Alembic for each command. The connection, and the transaction around it, are our caller's
(`store/database.py`), so that a migration is in force whole or not at all, on SQLite too."""

from alembic import context

from vitalis_serve.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
