"""The databases that accounts run on: every test that takes `database_url` runs on a SQLite file and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from penstock.serving.gateway.accounts import migrate
from penstock.serving.gateway.accounts.database import Database
from tests.services import PostgresServer, postgres_server, redis_server

__all__ = ["postgres_server", "redis_server"]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/accounts.db"
        return
    server = cast(PostgresServer, request.getfixturevalue("postgres_server"))
    url = server.fresh()
    yield url
    server.give_back(url)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with the current schema."""
    database = Database(database_url)
    await migrate.prepare(database)
    yield database
    await database.close()
