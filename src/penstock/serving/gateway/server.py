"""Runs the gateway under uvicorn: binds the port, serves, and on SIGTERM or SIGINT drains and returns.

signal ─▶ readiness off, new generations refused (503, Retry-After)
       ─▶ running ones finish, for at most drain_timeout_s; then they end with an error
       ─▶ connections close, `serve` returns (exit code 0); a second signal skips the waiting
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from penstock.core.config import ServerConfig
from penstock.core.errors import ConfigError
from penstock.serving.gateway.state import Gateway

logger = logging.getLogger(__name__)

# Longer than the idle time of the usual load balancers, so that they and not we close idle connections.
_KEEP_ALIVE_S = 75
# After draining, how long the last bytes may take to leave.
_CLOSE_TIMEOUT_S = 5
_BACKLOG = 2048


def bind_socket(config: ServerConfig) -> socket.socket:
    """Take the port before anything slow is loaded. Raises ConfigError with the fix."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"Cannot listen on {config.host!r}: {error.strerror}. Choose another --host.") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(_bind_failure(config, error)) from None
    sock.setblocking(False)
    return sock


def _bind_failure(config: ServerConfig, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {config.port} on {config.host} is in use; stop what uses it or choose another with --port."
    if error.errno == errno.EACCES:
        return f"Port {config.port} needs privileges that this user does not have; choose one above 1023 with --port."
    return f"Cannot listen on {config.host} port {config.port}: {error.strerror}. Change --host or --port."


def url_of(sock: socket.socket) -> str:
    """The address to type into a client."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end the process with the signal instead of 0."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


async def serve(
    app: FastAPI,
    config: ServerConfig,
    *,
    sock: socket.socket | None = None,
    on_started: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until a signal arrives or `stop` is set, then drain and return. `on_started` gets the URL once requests are accepted.

    `app` comes from `create_app`. Signals are handled only in the main thread.
    """
    listener = sock if sock is not None else bind_socket(config)
    url = url_of(listener)
    stop = stop if stop is not None else asyncio.Event()
    gateway: Gateway = app.state.gateway
    server = _Server(_uvicorn_config(app), lambda: on_started(url) if on_started is not None else None)
    with _signals(stop, server):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await _drain(gateway, server)
                server.should_exit = True
            await serving
        finally:
            stopping.cancel()
            serving.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)


def run_server(app: FastAPI, config: ServerConfig, on_started: Callable[[str], None] | None = None) -> None:
    """`serve` in an event loop of its own."""
    run_async(serve(app, config, on_started=on_started))


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` on uvloop where it is installed, on asyncio's own loop elsewhere."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_http_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )


def _http_protocol() -> Any:
    """Our bounded protocol over httptools where that is installed; uvicorn's h11 one, which bounds heads itself, elsewhere."""
    try:
        from penstock.serving.gateway.http_protocol import BoundedHttpProtocol
    except ImportError:
        return "h11"
    return BoundedHttpProtocol


async def _drain(gateway: Gateway, server: _Server) -> None:
    """Let running generations finish for at most drain_timeout_s, or until a second signal."""
    gateway.draining = True
    timeout_s = gateway.config.drain_timeout_s
    logger.info("draining: %d requests in flight, at most %g s", gateway.in_flight, timeout_s)
    drains = asyncio.gather(*(client.drain(timeout_s) for client in gateway.clients.values()))
    try:
        async with asyncio.timeout(timeout_s + _CLOSE_TIMEOUT_S):
            while not drains.done() and not server.force_exit:
                await asyncio.wait((drains,), timeout=0.1)
            if drains.done():
                drains.result()
    except TimeoutError:
        logger.warning("an engine did not drain in time")
    finally:
        drains.cancel()


@contextlib.contextmanager
def _signals(stop: asyncio.Event, server: _Server) -> Iterator[None]:
    """The first signal sets `stop`, the second forces the exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            server.force_exit = True
            server.should_exit = True
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
