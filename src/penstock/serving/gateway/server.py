"""Runs the gateway under uvicorn: binds the port, serves, and on SIGTERM or SIGINT drains and returns.

SIGTERM ─▶ readiness off, everything still accepted for drain_linger_s: load balancers take a while to look
SIGINT  ─▶ (and after that) readiness off, new generations refused (503, Retry-After)
        ─▶ running ones finish, for at most drain_timeout_s; then they end with an error
        ─▶ connections close, `serve` returns (exit code 0); a second signal skips the waiting
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from penstock.core.config import ServerConfig
from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.state import Gateway
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

# Longer than the idle time of the usual load balancers, so that they and not we close idle connections.
_KEEP_ALIVE_S = 75
# After draining, how long the last bytes may take to leave.
_CLOSE_TIMEOUT_S = 5
_BACKLOG = 2048
# Files and sockets that are no client's connection, refused connections among them.
_OTHER_FILES = 1024


def bind_socket(config: ServerConfig) -> socket.socket:
    """Take the port before anything slow is loaded. Raises ConfigError with the fix."""
    return _bind(config.host, config.port, "--host", "--port")


def bind_metrics_socket(config: GatewayConfig) -> socket.socket | None:
    """Take --metrics-port; None when there is none. Raises ConfigError with the fix."""
    if not config.metrics_port:
        return None
    return _bind(config.metrics_host, config.metrics_port, "--metrics-host", "--metrics-port")


def _bind(host: str, port: int, host_flag: str, port_flag: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host!r}: {error.strerror}. Choose another {host_flag}.") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(_bind_failure(error, host, port, host_flag, port_flag)) from None
    sock.setblocking(False)
    return sock


def _bind_failure(error: OSError, host: str, port: int, host_flag: str, port_flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is in use; stop what uses it or choose another with {port_flag}."
    if error.errno == errno.EACCES:
        return f"Port {port} needs privileges that this user does not have; choose one above 1023 with {port_flag}."
    return f"Cannot listen on {host} port {port}: {error.strerror}. Change {host_flag} or {port_flag}."


def check_tls_files(config: GatewayConfig) -> None:
    """Raise ConfigError when the certificate and key cannot be used together."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    for flag, name in (("--ssl-certfile", config.ssl_certfile), ("--ssl-keyfile", config.ssl_keyfile)):
        if not Path(name).is_file():
            raise ConfigError(f"There is no file {name}; give {flag} the path of a PEM file.")
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} cannot be used together ({error}); "
            "both must be PEM, and the key the certificate's, without a password."
        ) from None


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """The address to type into a client."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"{scheme}://{host}:{port}"


@dataclass(slots=True)
class Ending:
    """How a server is told to end: `terminate` lets it linger, `stop` does not, `hurry` skips all waiting. Signals set them too. Make it
    inside the event loop."""

    terminate: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)


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
    settings: GatewayConfig | None = None,
    *,
    sock: socket.socket | None = None,
    metrics_app: ASGIApp | None = None,
    metrics_sock: socket.socket | None = None,
    on_started: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    ending: Ending | None = None,
) -> None:
    """Serve until a signal arrives or `ending` (or `stop`, its last part) is set, then drain and return. `on_started` gets the URL once
    requests are accepted. `metrics_app` is served on `metrics_sock`, with neither TLS nor identity, until the end of the drain.

    `app` comes from `create_app`; its services are entered before the first request and left after the last. Signals are handled only in
    the main thread.
    """
    settings = settings if settings is not None else GatewayConfig(auth="none")
    ending = ending if ending is not None else Ending()
    if stop is not None:
        ending.stop = stop
    listener = sock if sock is not None else bind_socket(config)
    url = url_of(listener, "https" if settings.ssl_certfile else "http")
    gateway: Gateway = app.state.gateway
    config_of = functools.partial(_uvicorn_config, recorder=gateway.recorder)
    server = _Server(config_of(app, settings), lambda: on_started(url) if on_started is not None else None)
    _allow_connections(settings.max_connections)
    servers = [(server, listener)]
    if metrics_app is not None and metrics_sock is not None:
        plain = dataclasses.replace(settings, ssl_certfile=None, ssl_keyfile=None, root_path="")
        servers.append((_Server(config_of(metrics_app, plain), lambda: None), metrics_sock))
    async with gateway.services:
        with ending_signals(ending):
            await _run(servers, _wait_and_drain(gateway, settings.drain_linger_s, ending), ending.hurry)


async def _run(
    servers: list[tuple[_Server, socket.socket]], until_drained: Coroutine[Any, Any, None], hurry: asyncio.Event
) -> None:
    """Run the servers, each on its socket, until the drain is over or one of them ends."""
    serving = [asyncio.create_task(server.serve(sockets=[sock])) for server, sock in servers]
    draining = asyncio.create_task(until_drained)
    hurrying = asyncio.create_task(_force_exit(servers, hurry))
    try:
        await asyncio.wait((*serving, draining), return_when=asyncio.FIRST_COMPLETED)
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        if draining.done():
            draining.result()
    finally:
        for task in (draining, hurrying, *serving):
            task.cancel()
        await asyncio.gather(draining, hurrying, *serving, return_exceptions=True)


async def _force_exit(servers: list[tuple[_Server, socket.socket]], hurry: asyncio.Event) -> None:
    await hurry.wait()
    for server, _ in servers:
        server.should_exit = server.force_exit = True


def run_server(
    app: FastAPI,
    config: ServerConfig,
    on_started: Callable[[str], None] | None = None,
    settings: GatewayConfig | None = None,
) -> None:
    """`serve` in an event loop of its own."""
    run_async(serve(app, config, settings, on_started=on_started))


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` on uvloop where it is installed, on asyncio's own loop elsewhere."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files, where it may, so that --max-connections is the limit that clients meet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        if most < wanted:
            logger.warning(
                "--max-connections %d needs %d open files; this process may have %d (ulimit -n)", count, wanted, most
            )


def _uvicorn_config(app: ASGIApp, settings: GatewayConfig, recorder: Recorder) -> uvicorn.Config:
    protocol = _http_protocol(settings, recorder)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        root_path=settings.root_path,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        limit_concurrency=settings.max_connections if protocol == "h11" else None,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )


def _http_protocol(settings: GatewayConfig, recorder: Recorder) -> Any:
    """Our bounded protocol over httptools where that is installed. Elsewhere uvicorn's h11 one, which bounds heads and connections itself
    but waits for slow clients as long as they keep the connection."""
    try:
        from penstock.serving.gateway.http_protocol import BoundedHttpProtocol, HttpLimits
    except ImportError:
        return "h11"
    limits = HttpLimits(settings.max_connections, settings.read_timeout_s, write_timeout_s=settings.read_timeout_s)
    return functools.partial(BoundedHttpProtocol, limits=limits, recorder=recorder)


async def _wait_and_drain(gateway: Gateway, linger_s: float, ending: Ending) -> None:
    """Returns when the server may close its connections."""
    await _first_of(ending.terminate, ending.stop, ending.hurry)
    if ending.terminate.is_set() and linger_s > 0:
        gateway.lingering = True
        logger.info("ending: not ready any more, still accepting for %g s", linger_s)
        await _first_of(ending.stop, ending.hurry, timeout_s=linger_s)
    await _drain(gateway, ending.hurry)


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Returns when one of `events` is set, or after `timeout_s`."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _drain(gateway: Gateway, hurry: asyncio.Event) -> None:
    """Let running generations finish for at most drain_timeout_s, or until `hurry` is set."""
    gateway.draining = True
    timeout_s = gateway.config.drain_timeout_s
    logger.info("draining: %d requests in flight, at most %g s", gateway.in_flight, timeout_s)
    drains = asyncio.gather(*(client.drain(timeout_s) for client in gateway.clients.values()))
    hurrying = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait(
            (drains, hurrying), timeout=timeout_s + _CLOSE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if drains.done():
            drains.result()
        elif not hurrying.done():
            logger.warning("an engine did not drain in time")
    finally:
        hurrying.cancel()
        drains.cancel()
        await asyncio.gather(drains, hurrying, return_exceptions=True)


@contextlib.contextmanager
def ending_signals(ending: Ending) -> Iterator[None]:
    """The first signal ends the server, the second makes it hurry."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal(first: asyncio.Event) -> None:
        if ending.stop.is_set() or ending.terminate.is_set():
            ending.hurry.set()
        first.set()

    loop.add_signal_handler(signal.SIGINT, on_signal, ending.stop)
    loop.add_signal_handler(signal.SIGTERM, on_signal, ending.terminate)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
