"""A real HTTP server around a FakeClient, in a thread, on a free port: what a client program sees, without an engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import httpx
from fastapi import FastAPI

from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.app import create_app
from penstock.serving.gateway.server import run_async, serve
from penstock.serving.gateway.services import Services
from penstock.serving.gateway.state import Gateway
from penstock.telemetry.recorder import Recorder
from penstock.testing.fake_client import FakeClient

MODEL = "fake-model"
_START_TIMEOUT_S = 30


class GatewayServer:
    """A context manager; `url` is valid inside. `client` and `recorder` belong to the server's thread: a test reads them when the
    server is idle, and changes `client.behavior` between requests. Without `settings` there is neither authentication nor a response
    cache."""

    def __init__(
        self,
        config: ServerConfig | None = None,
        client: FakeClient | None = None,
        *,
        settings: GatewayConfig | None = None,
        services: Callable[[Recorder], Services] | None = None,
    ) -> None:
        self.config = config if config is not None else ServerConfig(port=0, drain_timeout_s=1)
        self.settings = settings if settings is not None else GatewayConfig(auth="none", response_cache="off")
        self.client = client if client is not None else FakeClient()
        self.recorder = Recorder()
        self.app: FastAPI = create_app(
            {MODEL: self.client},
            self.config,
            self.recorder,
            version="1.2.3",
            settings=self.settings,
            services=None if services is None else services(self.recorder),
        )
        self.url = ""
        self._started: Future[str] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    @property
    def gateway(self) -> Gateway:
        gateway: Gateway = self.app.state.gateway
        return gateway

    def __enter__(self) -> GatewayServer:
        self._thread.start()
        self.url = self._started.result(_START_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join(_START_TIMEOUT_S)
        if self._thread.is_alive():
            raise RuntimeError("the server did not stop")

    def stop(self) -> None:
        """Begin the drain, as a signal would."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        try:
            run_async(self._main())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await serve(self.app, self.config, self.settings, on_started=self._started.set_result, stop=self._stop)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response. Raises ValueError unless it has exactly OpenAI's shape and the response a request id."""
    body = response.json()
    error: dict[str, Any] = body["error"]
    exact = (
        response.headers["content-type"] == "application/json"
        and bool(response.headers["x-request-id"])
        and set(body) == {"error"}
        and set(error) == {"message", "type", "param", "code"}
        and all(isinstance(error[name], str) for name in ("message", "type"))
        and all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    )
    if not exact:
        raise ValueError(f"not an error object of OpenAI's shape: {body}")
    return error
