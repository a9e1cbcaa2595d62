"""`penstock keys` and `penstock db` as an operator uses them, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.serving.gateway.accounts.keys import hash_secret, parse_key
from tests.cli.conftest import Invoke, Result
from tests.services import PostgresServer, postgres_server

__all__ = ["postgres_server"]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty database, which the commands find in the environment."""
    server = None
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/accounts.db"
    else:
        server = cast(PostgresServer, request.getfixturevalue("postgres_server"))
        url = server.fresh()
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", url)
    yield url
    if server is not None:
        server.give_back(url)


def ok(result: Result) -> str:
    assert result.code == 0, result.err
    return result.out


def failed(result: Result, code: int) -> str:
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("penstock: error: ")
    assert result.err.count("\n") == 1
    return result.err


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("database_url")
def test_a_key_from_creation_to_the_end(invoke: Invoke) -> None:
    result = invoke("keys", "create", "--tenant", "acme", "--rpm", "60", "--label", "CI")
    token = ok(result).strip()
    parsed = parse_key(token)
    assert parsed is not None
    assert parsed.secret not in result.err
    assert parsed.key_id in result.err

    table = ok(invoke("keys", "list"))
    assert [line.split()[:5] for line in table.splitlines()] == [
        ["ID", "TENANT", "ROLE", "STATE", "LABEL"],
        [parsed.key_id, "acme", "user", "active", "CI"],
    ]
    page = ok(invoke("keys", "show", parsed.key_id))
    assert "rpm:          60\n" in page
    assert parsed.secret not in table + page
    assert hash_secret(parsed.secret).hex() not in page

    new_token = ok(invoke("keys", "rotate", parsed.key_id, "--grace", "10m")).strip()
    new = parse_key(new_token)
    assert new is not None
    states = {key["id"]: (key["state"], key["rpm"]) for key in objects(ok(invoke("keys", "list", "--json")))}
    assert states == {parsed.key_id: ("rotated", 60), new.key_id: ("active", 60)}

    assert ok(invoke("keys", "revoke", new.key_id)) == f"Key {new.key_id} of acme is revoked.\n"
    (shown,) = objects(ok(invoke("keys", "show", new.key_id, "--json")))
    assert shown["state"] == "revoked"
    assert "is revoked" in failed(invoke("keys", "rotate", new.key_id), 2)


@pytest.mark.usefixtures("database_url")
def test_every_option_of_create(invoke: Invoke) -> None:
    arguments = [
        *("--tenant", "acme", "--role", "admin", "--rpm", "1", "--tpm", "2", "--concurrency", "3", "--priority", "-4"),
        *(
            "--models",
            "small, big",
            "--weight",
            "1.5",
            "--budget",
            "12.50",
            "--expires",
            "2101-01-01",
            "--label",
            "x y",
        ),
    ]
    (made,) = objects(ok(invoke("keys", "create", *arguments, "--json")))
    parsed = parse_key(made.pop("key"))
    assert parsed is not None
    expected = {
        "id": parsed.key_id, "object": "key", "key_prefix": f"psk_{parsed.key_id}_…", "tenant": "acme", "role": "admin",
        "state": "active", "label": "x y", "models": ["small", "big"], "rpm": 1, "tpm": 2, "concurrency": 3, "priority": -4,
        "weight": 1.5, "budget": "12.50", "spent": "0.00", "expires_at": 4133980800.0, "revoked_at": None, "replaced_by": None,
        "created_at": made["created_at"],
    }  # fmt: skip
    assert made == expected
    (shown,) = objects(ok(invoke("keys", "show", parsed.key_id, "--json")))
    assert shown == expected


@pytest.mark.usefixtures("database_url")
def test_tenants(invoke: Invoke) -> None:
    assert "no such tenant" in failed(invoke("keys", "tenant", "acme"), 1)
    assert ok(invoke("keys", "tenant", "acme", "--rpm", "100", "--weight", "2")).split() == [
        "rpm:", "100", "tpm:", "none", "concurrency:", "none", "weight:", "2.0",
    ]  # fmt: skip
    ok(invoke("keys", "tenant", "acme", "--rpm", "none", "--tpm", "9"))
    assert ok(invoke("keys", "tenant", "acme")).split() == [
        "rpm:", "none", "tpm:", "9", "concurrency:", "none", "weight:", "2.0",
    ]  # fmt: skip


@pytest.mark.usefixtures("database_url")
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 2, "Missing command. See `penstock keys --help`."),
        (["make"], 2, "No such command 'make'."),
        (["create"], 2, "Missing option '--tenant'"),
        (["create", "--tenant", "a b"], 2, "'tenant' must be"),
        (["create", "--tenant", "a'; DROP TABLE api_keys; --"], 2, "'tenant' must be"),
        (["create", "--tenant", "a", "--rpm", "0"], 2, "'rpm' must be between 1"),
        (["create", "--tenant", "a", "--rpm", "x"], 2, "'--rpm': 'x' is not a valid integer"),
        (["create", "--tenant", "a", "--role", "root"], 2, "'root' is not one of"),
        (["create", "--tenant", "a", "--budget", "much"], 2, "'budget' must be a number such as 12.50"),
        (["create", "--tenant", "a", "--expires", "soon"], 2, "'expires' must be a duration such as 30d"),
        (["create", "--tenant", "a", "--expires", "2001-01-01"], 2, "'expires' must be in the future"),
        (["create", "--tenant", "a", "--models", ","], 2, "'models' must be"),
        (["show", "nothing"], 1, "There is no such key."),
        (["revoke", "' OR 1=1 --"], 1, "There is no such key."),
        (["rotate", "a" * 16], 1, "There is no such key."),
        (["rotate", "a" * 16, "--grace", "long"], 2, "'grace' must be a duration such as"),
        (["tenant", "acme", "--rpm", "many"], 2, "'many' is not a valid integer"),
        (["tenant", "acme", "--rpm", "0"], 2, "for no limit say 'none'"),
        (["tenant", "acme", "--tpm", "9" * 13], 2, "'tpm' must be between 1"),
    ],
)
def test_wrong_command_lines(invoke: Invoke, arguments: list[str], code: int, expected: str) -> None:
    assert expected in failed(invoke("keys", *arguments), code)
    assert ok(invoke("keys", "list", "--json")) == ""


def test_no_key_yet(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("keys", "list", "--database-url", f"sqlite:///{tmp_path}/x.db")
    assert ok(result) == ""
    assert "penstock keys create --tenant NAME" in result.err


def test_the_default_is_in_the_data_folder(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("PENSTOCK_DATABASE_URL", raising=False)
    ok(invoke("keys", "create", "--tenant", "acme"))
    file = tmp_path / "data" / "penstock" / "penstock.db"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("url", "code", "expected"),
    [
        ("postgresql://u:hidden@127.0.0.1:1/db", 2, "postgresql://u:***@127.0.0.1:1/db: ConnectionRefusedError"),
        ("mysql://u:hidden@h/db", 2, "'mysql' is not supported"),
        ("sqlite:////nowhere/x.db", 2, "/nowhere/x.db cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_used(invoke: Invoke, url: str, code: int, expected: str) -> None:
    line = failed(invoke("keys", "list", "--database-url", url), code)
    assert expected in line
    assert "hidden" not in line


def test_a_file_that_is_no_database(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("this is not a database, but a text of some length\n" * 100)
    line = failed(invoke("keys", "list", "--database-url", f"sqlite:///{tmp_path}/x.db"), 2)
    assert "not a database" in line


# ---- db ----


def test_upgrade_and_check(invoke: Invoke, database_url: str) -> None:
    assert "has schema none, this version needs a0001. Run `penstock db upgrade`." in failed(
        invoke("db", "upgrade", "--check"), 1
    )
    assert "now has schema a0001" in ok(invoke("db", "upgrade"))
    assert "has schema a0001" in ok(invoke("db", "upgrade"))
    assert "has schema a0001" in ok(invoke("db", "upgrade", "--check"))
    for text in (invoke("db", "upgrade").out, invoke("db", "upgrade", "--check").out):
        assert "pn-test-password" not in text


def test_a_newer_database(invoke: Invoke, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    ok(invoke("db", "upgrade", "--database-url", url))
    with sqlite3.connect(tmp_path / "x.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'z9999'")
    connection.close()
    assert "Use the newer version" in failed(invoke("db", "upgrade", "--check", "--database-url", url), 1)
    for command in (["db", "upgrade"], ["keys", "list"]):
        assert "does not know" in failed(invoke(*command, "--database-url", url), 2)


def test_help_needs_no_database(invoke: Invoke) -> None:
    program = (
        "import sys\nfrom penstock.cli.main import run\n"
        "assert run(['keys', 'create', '--help']) == 0\nassert run(['db', 'upgrade', '--help']) == 0\n"
        "print(sorted({'sqlalchemy', 'alembic', 'torch', 'fastapi'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--database-url" in ok(invoke("keys", "rotate", "--help"))
