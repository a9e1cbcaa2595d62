"""Run by Alembic inside the transaction that accounts.migrate has begun; the connection comes from there."""

from __future__ import annotations

from alembic import context

from penstock.serving.gateway.accounts.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite alters a table by making a new one.
    render_as_batch=True,
)
context.run_migrations()
