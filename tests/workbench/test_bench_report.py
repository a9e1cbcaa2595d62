"""`penstock bench` end to end: JSON that reads back as its struct, a table, one-line errors; the server process and the offline run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import msgspec
import pytest
from click.testing import CliRunner, Result

from penstock.core.errors import ConfigError
from penstock.core.types import SamplingParams
from penstock.workbench.bench.cli import bench
from penstock.workbench.bench.load import BenchmarkError
from penstock.workbench.bench.offline import run_batch
from penstock.workbench.bench.report import OfflineReport, ServeReport, StartupReport, align, markdown_table
from penstock.workbench.bench.server import ServerProcess
from penstock.workbench.bench.startup import measure_startup
from penstock.workbench.bench.workload import Lengths, Workload
from tests.workbench.fake_openai import FakeOpenAI

SMALL = ["--input-tokens", "8", "--output-tokens", "3", "--requests", "6", "--prompt-seed", "1"]


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(bench, list(arguments))
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (["--rate", "500"], "open loop, Poisson 500/s"),
        (["--concurrency", "2"], "closed loop, 2 users"),
        ([], "closed loop, 8 users"),
    ],
)
def test_serve_writes_a_table_and_json(load: list[str], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    with FakeOpenAI(cached=4) as server:
        result = invoke(
            "serve", "--url", server.url, "--slo-ttft", "60", "--api-key", "k3y", "--json", str(path), *SMALL, *load
        )
    report = msgspec.json.decode(path.read_bytes(), type=ServeReport)
    assert (report.schema, report.kind) == (1, "serve")
    assert (report.metrics.completed, report.metrics.failed, report.metrics.output_tokens) == (6, 0, 18)
    assert report.metrics.goodput_share == 1.0
    assert report.metrics.cached_share == 0.5
    assert report.metrics.exact_arrivals == 6
    assert report.settings["model"] == "fake-model"
    assert report.settings["prompt_seed"] == 1
    assert report.settings["load"] == expected
    assert report.environment.cores >= 1
    assert report.environment.versions["penstock"]
    assert report.client_cpu_s > 0
    assert "k3y" not in path.read_text()
    for words in (
        expected,
        "6 completed, 0 failed",
        "TTFT ms",
        "ITL ms",
        "E2E ms",
        "goodput",
        "50.0% of prompt tokens",
        "CPU s",
    ):
        assert words in result.output


def test_serve_tells_errors_by_kind_and_fails_when_nothing_works() -> None:
    with FakeOpenAI(failing=lambda number: "status") as server:
        result = CliRunner().invoke(
            bench, ["serve", "--url", server.url, "--warmup", "0", *SMALL], standalone_mode=False
        )
    assert result.return_value == 1
    assert "6 × http_503" in result.output
    assert "no room" in result.output


def test_serve_says_what_it_cannot_know() -> None:
    with FakeOpenAI(usage="final", tokens_per_event=(2,)) as server:
        result = invoke("serve", "--url", server.url, "--no-extensions", *SMALL)
    assert "6 streams do not say how many tokens an event holds" in result.output


def test_every_run_draws_new_prompts_unless_told() -> None:
    with FakeOpenAI() as server:
        for _ in range(2):
            invoke("serve", "--url", server.url, "--requests", "2", "--warmup", "0", "--output-tokens", "1")
    assert len({tuple(body["prompt"]) for body in server.seen}) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "1", "--concurrency", "1"], "one of them"),
        (["--requests", "0"], "--requests"),
        (["--input-tokens", "x"], "LOW:HIGH"),
        (["--token-range", "5"], "--token-range"),
        (["--extra-body", "[]"], "--extra-body"),
        (["--rate", "-1"], "arrival rate"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], words: str) -> None:
    with FakeOpenAI() as server, pytest.raises(ConfigError, match=words):
        invoke("serve", "--url", server.url, *arguments)


@dataclass(frozen=True)
class FakeSample:
    token_ids: list[int]


@dataclass(frozen=True)
class FakeOutput:
    outputs: list[FakeSample]
    num_cached_tokens: int = 0
    error: Exception | None = None


class FakeLLM:
    """Records what it is asked and answers with as many tokens."""

    made: ClassVar[list[dict[str, Any]]] = []
    calls: ClassVar[list[tuple[list[Any], list[SamplingParams]]]] = []

    def __init__(self, **settings: Any) -> None:
        FakeLLM.made.append(settings)

    def generate(self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams]) -> list[FakeOutput]:
        FakeLLM.calls.append((list(prompts), list(sampling_params)))
        return [FakeOutput([FakeSample([1] * (params.max_tokens or 0))]) for params in sampling_params]


def test_offline_measures_prefill_and_whole_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("penstock.llm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "penstock.llm", module)
    path = tmp_path / "report.json"
    result = invoke("offline", "shape", "--load-format", "dummy", "--no-prefix-caching", "--json", str(path), *SMALL)
    report = msgspec.json.decode(path.read_bytes(), type=OfflineReport)
    assert (report.requests, report.prompt_tokens, report.output_tokens) == (6, 48, 18)
    assert FakeLLM.made[0]["model"] == "shape"
    assert FakeLLM.made[0]["load_format"] == "dummy"
    assert FakeLLM.made[0]["prefix_caching"] is False
    warm, prefill, whole = FakeLLM.calls
    assert [len(prompts) for prompts, _ in (warm, prefill, whole)] == [1, 6, 6]
    assert all(params.max_tokens == 1 for params in prefill[1])
    assert all((params.max_tokens, params.min_tokens, params.ignore_eos) == (3, 3, True) for params in whole[1])
    assert len({tuple(prompt) for prompts, _ in FakeLLM.calls for prompt in prompts}) == 13
    assert "prefill" in result.output


def test_offline_run_with_a_failed_request_is_not_a_figure() -> None:
    class Failing(FakeLLM):
        def generate(self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams]) -> list[FakeOutput]:
            return [FakeOutput([]), FakeOutput([], error=RuntimeError("too long"))]

    requests = Workload(input_lengths=Lengths(2, 2), output_lengths=Lengths(1, 1), seed=1).requests(2)
    with pytest.raises(BenchmarkError, match="1 of 2 requests failed: too long"):
        run_batch(Failing(), requests)


def test_the_load_generator_needs_neither_torch_nor_a_web_framework() -> None:
    modules = ("cli", "load", "report", "metrics", "offline", "startup")
    imports = "; ".join(f"import penstock.workbench.bench.{module}" for module in modules)
    heavy = "{'torch', 'fastapi', 'uvicorn', 'zmq', 'transformers'}"
    code = f"import sys; {imports}; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


READY_SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if self.path == "/health/ready" and Handler.asked > 2 else 503)
        self.end_headers()
    def log_message(self, *_): pass
assert sys.argv[1] == "--port"
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def test_server_process_waits_for_ready_and_stops() -> None:
    with ServerProcess([sys.executable, "-c", READY_SERVER], timeout_s=30) as server:
        assert server.ready_s > 0
        assert server.url.startswith("http://127.0.0.1:")
        assert Path(f"/proc/{server.pid}").exists() or sys.platform != "linux"
        pid = server.pid
    assert not Path(f"/proc/{pid}").exists()


def test_server_process_tells_why_it_died() -> None:
    server = ServerProcess([sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"])
    with pytest.raises(BenchmarkError, match=r"exited with 3\. no such model"), server:
        pytest.fail("must not become ready")


def test_server_process_that_never_gets_ready() -> None:
    server = ServerProcess([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)
    with pytest.raises(BenchmarkError, match="not ready within"), server:
        pytest.fail("must not become ready")


def test_startup_is_measured_in_turns() -> None:
    order: list[str] = []
    report = measure_startup(
        [sys.executable, "-S", "-c", READY_SERVER],
        2,
        baseline=[sys.executable, "-S", "-c", "pass"],
        on_run=lambda name, seconds: order.append(name),
    )
    assert order == ["server", "torch", "torch", "server"]
    assert len(report.server_s) == len(report.torch_s) == 2
    assert report.difference_low_s <= report.difference_median_s <= report.difference_high_s
    assert msgspec.json.decode(msgspec.json.encode(report), type=StartupReport) == report


def test_tables() -> None:
    rows = [["name", "ms"], ["long name", "1.5"], ["x", "100.0"]]
    assert align(rows) == "name          ms\n---------  -----\nlong name    1.5\nx          100.0"
    assert markdown_table(rows) == "| name | ms |\n|---|---:|\n| long name | 1.5 |\n| x | 100.0 |"
