"""Random requests made from the OpenAPI schema, against the real engine: no 500, no hang, and the engine is well afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.testing.server import RunningServer


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_request_breaks_the_server(tmp_path: Path, examples: int) -> None:
    # A server of its own: the requests change its limits.
    with RunningServer("stories", "--kv-cache-gib", "0.05", "--threads", "1", log=tmp_path / "log") as server:
        fuzz(server, examples)
        assert server.get("/health/ready")[0] == 200
        assert server.metric("penstock_engine_restarts_total") == 0
        assert server.metric("penstock_engine_step_failures_total") == 0


def fuzz(server: RunningServer, examples: int) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{server.url}/openapi.json",
        *("--url", server.url),
        *("--checks", "not_a_server_error"),
        *("--max-examples", str(examples)),
        *("--request-timeout", "30"),
        *("--seed", "1"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert "passed" in result.stdout
