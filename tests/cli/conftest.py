"""Runs commands in this process, and stands in for the engine behind them."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest
import uvicorn

from penstock.cli.main import run
from penstock.core.config import EngineConfig, ServerConfig
from penstock.serving.gateway.app import create_app
from penstock.testing.fake_client import FakeClient


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended: exit code and what it wrote."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    monkeypatch.setenv("PENSTOCK_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PENSTOCK_DEBUG", raising=False)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = run(list(arguments))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """A folder that passes for a model as long as nothing loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """A fake in place of the engine that a command would start; `engine.config` is what it was started with."""
    client = FakeClient()

    class FakeAsyncLLM:
        def __init__(self, config: EngineConfig) -> None:
            self.config = config

        async def __aenter__(self) -> FakeClient:
            return client

        async def __aexit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            """Nothing to release."""

    module = types.ModuleType("penstock.llm")
    module.AsyncLLM = FakeAsyncLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "penstock.llm", module)
    return client


@dataclasses.dataclass(frozen=True)
class RunningServer:
    url: str
    client: FakeClient


@pytest.fixture
def server() -> Iterator[RunningServer]:
    """The real gateway over HTTP in front of a fake engine; serves the model "fake"."""
    client = FakeClient()
    app = create_app({"fake": client}, ServerConfig())
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off")
    http_server = uvicorn.Server(config)
    thread = threading.Thread(target=http_server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not http_server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = http_server.servers[0].sockets[0].getsockname()[1]
    yield RunningServer(f"http://127.0.0.1:{port}", client)
    http_server.should_exit = True
    thread.join(20)
