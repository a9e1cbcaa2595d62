"""The composition root of a server with several gateway processes (--gateway-workers).

penstock serve ─ this process: watches the others, serves nothing itself
               ├ `python -m penstock.launch …`                     the engine
               ├ `python -m penstock.launch_worker coordinator …`  shared limits, cache and flights, unless there is Redis
               └ `python -m penstock.launch_worker worker …`       gateway and frontend, N times

What all of them are told comes over their control channels (serving/cluster/control_channel); see gateway_workers for what belongs to whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.config import EngineConfig, ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.launch import StartUp, engine_command, prepare
from penstock.launch_worker import WorkerSettings

if TYPE_CHECKING:
    from penstock.core.transport import ClientEndpoint, SocketDirectory
    from penstock.core.types import Hello
    from penstock.serving.cluster.gateway_workers import GatewayWorkers, MakeProcess
    from penstock.serving.cluster.kept_process import KeptProcess, ProcessEvents
    from penstock.serving.gateway.server import Ending

logger = logging.getLogger(__name__)

# Beyond the drain's own time-outs, how long a worker may take to end before it is killed.
STOP_GRACE_S = 15.0


async def serve_workers(engine: EngineConfig, server: ServerConfig, gateway: GatewayConfig, folder: Path) -> int:
    """Serve until a signal arrives; exit status 0 then, 1 when the engine is gone for good. Raises ConfigError with the fix when the
    engine or a worker does not start."""
    started = time.perf_counter()
    from penstock.core.transport import SocketDirectory

    with SocketDirectory() as sockets:
        parent = _Parent(engine, server, folder, sockets)
        try:
            await parent.start_engine()
            await parent.serve(StartUp(engine, server, gateway, started))
        finally:
            await parent.stop()
        if parent.failure is not None:
            logger.error("the engine is gone for good: %s", parent.failure)
            return 1
        return 0


class _Parent:
    """The engine's supervisor and the workers, each told what happens to the other."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, folder: Path, sockets: SocketDirectory) -> None:
        from penstock.serving.cluster.supervisor import EngineSupervisor

        self.failure: str | None = None
        self._server = server
        self._folder = folder
        self._sockets = sockets
        self._address = ""
        self._state: Callable[[GatewayWorkers], None] | None = None
        self._greeting: ClientEndpoint | None = None
        self._gone = asyncio.Event()
        self._workers: GatewayWorkers | None = None
        self._starting: asyncio.Task[Hello] | None = None
        self._supervisor = EngineSupervisor(
            engine_command(engine, folder, log_level=server.log_level, log_format=server.log_format),
            new_address=self._new_address,
            on_ready=self._engine_ready,
            on_lost=lambda reason: self._tell(lambda workers: workers.engine_lost(reason)),
            on_gone=self._engine_gone,
            finished_requests=lambda: 0 if self._workers is None else self._workers.finished_requests,
            max_restarts=server.max_restarts,
        )

    async def start_engine(self) -> None:
        """Begin to start the engine: it imports torch while this process imports the web stack."""
        self._starting = asyncio.create_task(self._supervisor.start())
        await asyncio.sleep(0)

    async def serve(self, about: StartUp) -> None:
        """Bind the port, start the workers, report, and return when all of them have ended after a signal or with the engine."""
        assert self._starting is not None  # noqa: S101  for the type checker: start_engine came before
        await asyncio.to_thread(_import_server)
        from penstock.serving.gateway.server import (
            Ending,
            bind_metrics_socket,
            bind_socket,
            ending_signals,
            url_of,
        )

        ending = Ending(stop=self._gone)
        with contextlib.ExitStack() as held, ending_signals(ending):
            listener = held.enter_context(bind_socket(self._server))
            gateway = await prepare(self._server, about.gateway)
            about = dataclasses.replace(about, gateway=gateway)
            metrics_listener = bind_metrics_socket(gateway)
            if metrics_listener is not None:
                held.enter_context(metrics_listener)
            workers = self._make_workers(gateway, about.model_name, listener, metrics_listener)
            try:
                # The engine may be there first.
                self._workers = workers
                if self._state is not None:
                    self._state(workers)
                await self._until_ended(
                    workers, ending, about, url_of(listener, "https" if gateway.ssl_certfile else "http")
                )
            finally:
                longest_s = self._server.drain_timeout_s + gateway.drain_linger_s + STOP_GRACE_S
                await workers.stop(longest_s, linger=ending.terminate.is_set(), hurry=ending.hurry)

    async def _until_ended(self, workers: GatewayWorkers, ending: Ending, about: StartUp, url: str) -> None:
        """Start the workers and wait for the end. Raises ConfigError when they or the engine do not start."""
        assert self._starting is not None  # noqa: S101  for the type checker: start_engine came before
        waits = [asyncio.create_task(event.wait()) for event in (ending.stop, ending.terminate)]
        workers_starting = asyncio.create_task(workers.start())
        try:
            pending: set[asyncio.Task[Any]] = {self._starting, workers_starting}
            while pending and not any(wait.done() for wait in waits):
                done, pending = await asyncio.wait({*pending, *waits}, return_when=asyncio.FIRST_COMPLETED)
                pending -= set(waits)
                for task in done - set(waits):
                    task.result()
            if not pending:
                about.report(self._starting.result(), url)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (workers_starting, *waits):
                task.cancel()
            await asyncio.gather(workers_starting, *waits, return_exceptions=True)

    async def stop(self) -> None:
        """End the engine."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._supervisor.stop()
        self._close_greeting()

    def _make_workers(
        self, gateway: GatewayConfig, name: str, listener: socket.socket, metrics_listener: socket.socket | None
    ) -> GatewayWorkers:
        from penstock.serving.cluster.gateway_workers import GatewayWorkers

        settings = WorkerSettings(
            server=self._server,
            gateway=gateway,
            folder=self._folder,
            model_name=name,
            listener=listener.fileno(),
            metrics_listener=None if metrics_listener is None else metrics_listener.fileno(),
            coordinator=None if gateway.redis_url else self._sockets.path / "coordinator",
        )
        return GatewayWorkers(
            gateway.gateway_workers,
            _process_maker("worker", settings),
            None if settings.coordinator is None else _process_maker("coordinator", settings),
            on_hang=self._supervisor.kill,
        )

    def _new_address(self) -> str:
        self._address = self._sockets.new_address()
        return self._address

    def _engine_ready(self, endpoint: ClientEndpoint, hello: Hello) -> None:
        """The workers greet the engine themselves; this process leaves it."""
        from penstock.core.types import Disconnect

        address = self._address
        self._close_greeting()
        self._greeting = endpoint
        endpoint.send(Disconnect())
        self._tell(lambda workers: workers.engine_ready(address))

    def _engine_gone(self, reason: str) -> None:
        self.failure = reason
        self._tell(lambda workers: workers.engine_gone(reason))
        self._gone.set()

    def _tell(self, state: Callable[[GatewayWorkers], None]) -> None:
        self._state = state
        if self._workers is not None:
            state(self._workers)

    def _close_greeting(self) -> None:
        if self._greeting is not None:
            self._greeting.close()
            self._greeting = None


def _import_server() -> None:
    import penstock.serving.gateway.server  # noqa: F401


def _process_maker(kind: str, settings: WorkerSettings) -> MakeProcess:
    from penstock.serving.cluster.kept_process import KeptProcess

    inherited = [settings.listener] if kind == "worker" else []
    if kind == "worker" and settings.metrics_listener is not None:
        inherited.append(settings.metrics_listener)

    def make(name: str, events: ProcessEvents) -> KeptProcess:
        command = [sys.executable, "-m", "penstock.launch_worker", kind]
        return KeptProcess(name, command, settings.as_message(), events, pass_fds=inherited)

    return make
