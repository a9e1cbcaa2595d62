"""Alembic migrations of the account database. A new one: a file in versions/ whose down_revision is the last one's revision."""
