"""Random requests made from the OpenAPI schema, against the real engine: no 500, no hang, and the engine is well afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.testing.server import RunningServer


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("examples", [10, 300])
def test_no_request_breaks_the_server(tmp_path: Path, examples: int) -> None:
    # A server of its own: the requests change its limits.
    with RunningServer("stories", "--kv-cache-gib", "0.05", "--threads", "1", log=tmp_path / "log") as server:
        fuzz(server, examples)
        check_well(server)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("examples", [10, 300])
def test_no_request_of_an_admin_breaks_a_server_with_accounts(tmp_path: Path, examples: int) -> None:
    database = f"sqlite:///{tmp_path}/accounts.db"
    create = ["keys", "create", "--tenant", "fuzz", "--role", "admin", "--tpm", "1000000", "--concurrency", "64"]
    command = [sys.executable, "-m", "penstock.cli.main", *create, "--json", "--database-url", database]
    key = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)["key"]
    flags = ("--auth", "keys", "--database-url", database, "--kv-cache-gib", "0.05", "--threads", "1")
    with RunningServer("stories", *flags, log=tmp_path / "log") as server:
        fuzz(server, examples, "--header", f"Authorization: Bearer {key}")
        check_well(server)


def check_well(server: RunningServer) -> None:
    """Ready, and nothing happened that the log shows with a traceback or a new engine."""
    log = server.log.read_text()
    assert server.get("/health/ready")[0] == 200
    assert "Traceback" not in log
    assert "restart" not in log


def fuzz(server: RunningServer, examples: int, *flags: str) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{server.url}/openapi.json",
        *("--url", server.url),
        *("--checks", "not_a_server_error"),
        *("--max-examples", str(examples)),
        *("--request-timeout", "30"),
        *("--seed", "1"),
        *flags,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert "passed" in result.stdout
