"""A real Prometheus reads what the server exports. `make system-deps` installs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.testing.server import RunningServer, free_port

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool; `make system-deps` installs them",
)


def test_promtool_accepts_the_page(server: RunningServer, client: openai.OpenAI) -> None:
    client.completions.create(model="stories", prompt="The fox", max_tokens=2)
    page = server.get("/metrics")[1]
    result = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def query(port: int, expression: str) -> list[dict[str, Any]]:
    """The result vector of an instant query; empty while Prometheus does not answer."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            result = json.load(response)["data"]["result"]
    except OSError:
        return []
    assert isinstance(result, list)
    return result


def test_prometheus_scrapes_counters_and_histograms(
    server: RunningServer, client: openai.OpenAI, tmp_path: Path
) -> None:
    client.completions.create(model="stories", prompt="The fox", max_tokens=2)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: penstock, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}]\n"
    )
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 40
        while not (found := query(port, 'penstock_time_to_first_token_seconds_count{model="stories"} > 0')):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.3)
        assert found[0]["metric"]["job"] == "penstock"
        assert query(port, "up")[0]["value"][1] == "1"
        (quantile,) = query(port, "histogram_quantile(0.5, sum by (le) (penstock_engine_step_seconds_bucket))")
        assert 0 < float(quantile["value"][1]) < 10
    finally:
        process.terminate()
        process.wait(20)
