"""`penstock serve` as a user meets it: what it prints, how it ends, and how it says no."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.server import RunningServer


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_start_up_report_and_ctrl_c(tmp_path: Path) -> None:
    with RunningServer("stories", "--kv-cache-gib", "0.1", log=tmp_path / "log") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        assert server.interrupt() == 0
        text = server.log.read_text()
    for expected in (
        "load",
        "warm-up",
        "ready",
        "KV cache",
        "tokens in blocks of 16",
        f"curl {server.url}/v1/chat/completions",
    ):
        assert expected in text
    assert "Traceback" not in text
    assert not psutil.wait_procs(children, timeout=5)[1], "no process is left behind"


def test_ctrl_c_lets_running_requests_finish(tmp_path: Path) -> None:
    with RunningServer("stories", "--kv-cache-gib", "0.1", "--threads", "1", log=tmp_path / "log") as server:
        body = {"model": "stories", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(2)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(rest)
        assert server.process.wait(20) == 0


def test_a_port_in_use_is_one_line_with_the_fix() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = penstock("serve", "stories", "--port", str(taken.getsockname()[1]))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("penstock")]
    assert len(lines) == 1, result.stderr
    assert "in use" in lines[0]
    assert "--port" in lines[0]
    assert "Traceback" not in result.stderr


def test_too_little_memory_is_one_line_with_the_fix() -> None:
    result = penstock("serve", "stories", "--port", "0", "--kv-cache-gib", "0.00001")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "raise --kv-cache-gib" in result.stderr.splitlines()[-1]


def test_a_broken_checkpoint_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", tokenizer=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = penstock("serve", str(folder), "--port", "0")
    assert result.returncode != 0
    assert "model.safetensors" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_dummy_weights_without_a_tokenizer_take_token_ids(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    flags = ("--load-format", "dummy", "--kv-cache-gib", "0.05", "--served-model-name", "shape")
    with RunningServer(str(folder), *flags, log=tmp_path / "log") as server:
        body = {"model": "shape", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        refused = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": "text"}, timeout=30)
        assert refused.status_code == 400
        assert "token ids" in refused.json()["error"]["message"]


def test_health_is_503_until_the_engine_is_warm(tmp_path: Path) -> None:
    seen = set()
    with RunningServer("stories", "--kv-cache-gib", "0.1", log=tmp_path / "log") as server:
        server.signal_engine(9)  # type: ignore[arg-type]
        deadline = time.monotonic() + 20
        while 503 not in seen and time.monotonic() < deadline:
            seen.add(server.get("/health/ready")[0])
            assert server.get("/health/live")[0] == 200
        server.wait_ready()
    assert 503 in seen
