"""The composition root: the only place where concrete classes of all wings meet.

penstock serve ─ this process: gateway, frontend, supervisor
               └ child: `python -m penstock.launch --config … --address … --parent-pid …`: engine, scheduler, model

With --gateway-workers above 1, gateway and frontend are in processes of their own: see `launch_gateway`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.config import EngineConfig, ServerConfig
from penstock.core.errors import ConfigError, ModelFormatError, PenstockError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import LiveLimits

if TYPE_CHECKING:
    from penstock.core.transport import EngineEndpoint
    from penstock.core.types import Hello
    from penstock.engine.engine import Engine
    from penstock.execution.runner.executors import UniProcessExecutor
    from penstock.execution.runner.parallel_executor import ParallelExecutor
    from penstock.serving.frontend.async_engine import AsyncEngine
    from penstock.serving.frontend.client import EngineClient
    from penstock.serving.gateway.app import GatewayApp
    from penstock.serving.gateway.services import SharedStores
    from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

Timeline = list[tuple[str, float]]

# Tries before an idle OpenMP thread sleeps; a few dozen microseconds.
GOMP_SPINCOUNT = "2000"

# How long a child that cannot start waits for the question that it answers with the reason.
STARTUP_FAILURE_WAIT_S = 5.0


def build_engine(
    config: EngineConfig, folder: Path, *, on_gone: Callable[[str], None] | None = None, progress: bool = False
) -> tuple[Engine, Timeline]:
    """Load the model in `folder` and put an engine around it; with the phases of the start and the seconds of each.

    on_gone: called in another thread when ranks of the engine have ended, so that it cannot go on; a step says so as well. Raises
    ConfigError or ModelFormatError with the fix.
    """
    started = time.perf_counter()
    # Read when torch loads its OpenMP runtime. By default its threads spin for milliseconds after each piece of work, on cores that the
    # gateway needs between two steps.
    os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)
    from penstock.engine.engine import Engine

    executor, imported = _make_executor(config, folder, on_gone, progress)
    resolved = executor.config
    engine = Engine(
        executor,
        LiveLimits(
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            max_num_seqs=resolved.max_num_seqs,
            max_prefill_tokens_while_decoding=resolved.max_prefill_tokens_while_decoding,
        ),
        policy=resolved.scheduling_policy,
        prefix_caching=resolved.prefix_caching,
        max_waiting_requests=resolved.max_waiting_requests,
    )
    return engine, [("import", imported - started), *executor.timeline]


def _make_executor(
    config: EngineConfig, folder: Path, on_gone: Callable[[str], None] | None, progress: bool
) -> tuple[UniProcessExecutor | ParallelExecutor, float]:
    """The model, started: in this process, or in those of its ranks, and then torch is imported there only. With the time at which imports
    were done."""
    if config.num_ranks > 1:
        from penstock.execution.runner.parallel_executor import ParallelExecutor

        imported = time.perf_counter()
        return ParallelExecutor(config, folder, on_gone=on_gone, progress=progress), imported
    from penstock.execution.runner.executors import UniProcessExecutor
    from penstock.execution.runner.out_of_memory import is_out_of_memory

    imported = time.perf_counter()
    try:
        return UniProcessExecutor(config, folder, progress=progress), imported
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise ConfigError(_no_memory(folder)) from error
        raise


def _no_memory(folder: Path) -> str:
    return (
        f"There is not enough memory for {folder.name}: lower --kv-cache-gib, --max-num-seqs or --max-num-batched-tokens, "
        "or choose a smaller model."
    )


# ---- the engine's process ----


def engine_command(config: EngineConfig, folder: Path, *, log_level: str, log_format: str) -> list[str]:
    """The command that runs an engine process; the supervisor appends --address and --parent-pid."""
    settings = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "penstock.launch", "--config", settings, "--folder", str(folder)]
    return [*command, "--log-level", log_level, "--log-format", log_format]


def engine_main(arguments: list[str]) -> int:
    """Run an engine process until it is told to end. Exit status 0 after that, 1 when it could not start or its ranks are gone."""
    options = _parse_engine_arguments(arguments)
    from penstock.core.log import configure_logging
    from penstock.core.process import exit_when_parent_dies
    from penstock.core.transport import ZmqEngineEndpoint

    exit_when_parent_dies(options.parent_pid)
    configure_logging(options.log_level, options.log_format)
    endpoint = ZmqEngineEndpoint(options.address)
    gone = threading.Event()
    try:
        try:
            config = EngineConfig(**json.loads(options.config))
            engine, timeline = build_engine(
                config, Path(options.folder), on_gone=lambda reason: gone.set(), progress=sys.stderr.isatty()
            )
        except (ConfigError, ModelFormatError) as error:
            _report_failure(endpoint, error)
            return 1
        _run_engine(engine, endpoint, timeline, gone)
    finally:
        endpoint.close()
    return 1 if gone.is_set() else 0


def _parse_engine_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m penstock.launch", description="An engine process.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    return parser.parse_args(arguments)


def _run_engine(engine: Engine, endpoint: EngineEndpoint, timeline: Timeline, gone: threading.Event) -> None:
    """Until told to stop, or until `gone` is set: an engine without its ranks is of no use, whether it has work or not."""
    from penstock.engine.process import EngineLoop

    loop = EngineLoop(engine, endpoint, timeline)

    def stop_when_gone() -> None:
        gone.wait()
        loop.stop()

    threading.Thread(target=stop_when_gone, name="ranks-watch", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda signum, frame: loop.stop())
    try:
        loop.run()
    finally:
        engine.shutdown()


def _report_failure(endpoint: EngineEndpoint, error: PenstockError) -> None:
    """Answer the first client's Connect with the reason."""
    from penstock.core.types import StartupFailed

    logger.error("the engine cannot start: %s", error)
    for client, _ in endpoint.receive(STARTUP_FAILURE_WAIT_S):
        endpoint.send(client, StartupFailed(str(error)))


# ---- the server's process ----


def serve(engine: EngineConfig, server: ServerConfig, gateway: GatewayConfig | None = None) -> int:
    """Serve until a signal arrives; exit status 0 then, 1 when the engine is gone for good.

    Raises ConfigError or ModelFormatError with the fix when the server cannot start.
    """
    from penstock.core.log import configure_logging
    from penstock.hub import resolve_models

    configure_logging(server.log_level, server.log_format)
    folder, engine = resolve_models(engine)
    gateway = gateway if gateway is not None else GatewayConfig()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if gateway.gateway_workers == 1:
            return runner.run(_serve(engine, server, gateway, folder))
        from penstock.launch_gateway import serve_workers

        return runner.run(serve_workers(engine, server, gateway, folder))


async def prepare(server: ServerConfig, gateway: GatewayConfig) -> GatewayConfig:
    """What is checked and made once, in the first process, before the port opens; the settings as they hold then."""
    from penstock.serving.gateway.security.startup import check_jwt, resolve_auth
    from penstock.serving.gateway.server import check_tls_files

    check_tls_files(gateway)
    gateway = resolve_auth(gateway, server.host)
    check_jwt(gateway)
    return gateway


async def make_app(
    clients: Mapping[str, EngineClient],
    server: ServerConfig,
    gateway: GatewayConfig,
    recorder: Recorder,
    *,
    shared: SharedStores | None = None,
) -> GatewayApp:
    """The application with its services, in each process that serves. `gateway` comes from `prepare`; `shared` are the coordinator's."""
    from penstock import __version__
    from penstock.serving.gateway.app import create_app
    from penstock.serving.gateway.services import open_services

    services = await open_services(
        gateway, server.host, recorder, __version__, shared=shared, workers=gateway.gateway_workers
    )
    return create_app(clients, server, recorder, version=__version__, settings=gateway, services=services)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


async def _serve(engine: EngineConfig, server: ServerConfig, gateway: GatewayConfig, folder: Path) -> int:
    started = time.perf_counter()
    from penstock.core.transport import SocketDirectory
    from penstock.serving.cluster.supervisor import EngineSupervisor

    stop = asyncio.Event()
    failure: list[str] = []

    def on_gone(reason: str) -> None:
        failure.append(reason)
        client.add_done_callback(lambda future: future.result().engine_gone(reason))
        stop.set()

    # The engine starts first and imports torch while this process imports the web stack, so its callbacks wait for the client.
    client: asyncio.Future[AsyncEngine] = asyncio.get_running_loop().create_future()
    sockets = SocketDirectory()
    supervisor = EngineSupervisor(
        engine_command(engine, folder, log_level=server.log_level, log_format=server.log_format),
        new_address=sockets.new_address,
        on_ready=lambda endpoint, hello: client.add_done_callback(lambda f: f.result().engine_ready(endpoint, hello)),
        on_lost=lambda reason: client.add_done_callback(lambda f: f.result().engine_lost(reason)),
        on_gone=on_gone,
        finished_requests=lambda: client.result().finished_requests if client.done() else 0,
        max_restarts=server.max_restarts,
    )
    starting = asyncio.create_task(supervisor.start())
    try:
        await asyncio.sleep(0)
        client.set_result(await asyncio.to_thread(make_client, folder, server, supervisor.kill))
        await _serve_client(client.result(), starting, StartUp(engine, server, gateway, started), stop)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if client.done():
            await client.result().close()
        await supervisor.stop()
        sockets.close()
    if failure:
        logger.error("the engine is gone for good: %s", failure[0])
        return 1
    return 0


@dataclass(frozen=True, slots=True)
class StartUp:
    """What the start-up report is about. `started`: time.perf_counter() at the beginning."""

    engine: EngineConfig
    server: ServerConfig
    gateway: GatewayConfig
    started: float

    @property
    def model_name(self) -> str:
        """What the model is called in the API."""
        return self.server.served_model_name or model_name(self.engine.model)

    def report(self, hello: Hello, url: str) -> None:
        """Print where the time went and what is in force."""
        from penstock.cli.startup_report import startup_report

        seconds = time.perf_counter() - self.started
        report = startup_report(self.engine, self.server, self.gateway, hello, self.model_name, url, seconds)
        print(report, flush=True)  # noqa: T201


def make_client(folder: Path, server: ServerConfig, on_hang: Callable[[str], None]) -> AsyncEngine:
    """The frontend, and with it the web stack's imports."""
    import penstock.serving.gateway.app  # noqa: F401
    from penstock.serving.frontend.async_engine import AsyncEngine
    from penstock.serving.frontend.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is not None:
        tokenizer.warm_up()
    return AsyncEngine(
        tokenizer,
        hang_timeout_s=server.hang_timeout_s,
        on_hang=on_hang,
    )


async def _serve_client(
    client: AsyncEngine, starting: asyncio.Task[Hello], about: StartUp, stop: asyncio.Event
) -> None:
    """Bind the port, answer health checks while the engine loads, then serve until `stop` or a signal."""
    from penstock.serving.gateway.metrics_server import create_metrics_app
    from penstock.serving.gateway.routes.operations import metrics_page
    from penstock.serving.gateway.server import bind_metrics_socket, bind_socket, url_of
    from penstock.serving.gateway.server import serve as serve_app
    from penstock.telemetry.recorder import Recorder

    server = about.server
    sock = bind_socket(server)
    gateway = await prepare(server, about.gateway)
    about = dataclasses.replace(about, gateway=gateway)
    metrics_sock = bind_metrics_socket(gateway)
    app = await make_app({about.model_name: client}, server, gateway, Recorder())
    metrics_app = create_metrics_app(lambda: metrics_page(app.state.gateway), gateway.metrics_host)
    serving = asyncio.create_task(
        serve_app(app, server, gateway, sock=sock, metrics_app=metrics_app, metrics_sock=metrics_sock, stop=stop)
    )
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            about.report(starting.result(), url_of(sock, "https" if gateway.ssl_certfile else "http"))
    finally:
        if starting.done() and not starting.cancelled() and starting.exception() is not None:
            stop.set()
        await serving


def model_name(model: str) -> str:
    """What a model is called in the API when nothing else is said: a folder's own name, a GGUF file's without its ending, a hub
    name as it is."""
    path = Path(model).expanduser()
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


if __name__ == "__main__":
    sys.exit(engine_main(sys.argv[1:]))
