"""Optional packages: which extra brings what, and a one-line error for one that is missing."""

from __future__ import annotations

import importlib.util

from penstock.core.errors import ConfigError

# extra → (what it is for, modules that it brings)
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "server": (
        "penstock serve, penstock keys, penstock chat --url",
        ("aiosqlite", "alembic", "fastapi", "httpx", "jwt", "prometheus_client", "sqlalchemy", "uvicorn", "zmq"),
    ),
    "redis": ("--redis-url", ("redis",)),
    "postgresql": ("--database-url postgresql://…", ("asyncpg",)),
    "verify": ("penstock verify", ("transformers",)),
}


def missing_modules(modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that are not installed; imports none of them."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def require(extra: str, *modules: str) -> None:
    """Raise ConfigError naming the extra when one of `modules` is not installed."""
    missing = missing_modules(modules)
    if missing:
        raise ConfigError(
            f"{EXTRAS[extra][0]} needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"run `pip install 'penstock[{extra}]'`."
        )
