"""The composition root of one gateway process among several, and of their coordinator: children of `launch_gateway`'s process.

What a child is told comes over its control channel (serving/cluster/control_channel).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.config import ServerConfig
from penstock.core.errors import EngineDeadError, PenstockError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.log import configure_logging
from penstock.launch import loop_factory, make_app, make_client

if TYPE_CHECKING:
    from penstock.serving.cluster.control_channel import Begin, ToChild
    from penstock.serving.cluster.parent_link import ParentLink
    from penstock.serving.frontend.async_engine import AsyncEngine
    from penstock.serving.gateway.server import Ending
    from penstock.serving.gateway.services import SharedStores
    from penstock.serving.gateway.stores.coordinator_client import CoordinatorLink
    from penstock.telemetry.recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker or the coordinator is told. `listener` and `metrics_listener` are inherited file descriptors; `coordinator` is the
    path of its socket, None with Redis."""

    server: ServerConfig
    gateway: GatewayConfig
    folder: Path
    model_name: str
    listener: int
    metrics_listener: int | None
    coordinator: Path | None

    def as_message(self) -> Begin:
        from penstock.serving.cluster.control_channel import Begin

        values = dataclasses.asdict(self)
        values.update(folder=str(self.folder), coordinator=None if self.coordinator is None else str(self.coordinator))
        return Begin(values)

    @classmethod
    def from_message(cls, begin: Begin) -> WorkerSettings:
        values = dict(begin.settings)
        coordinator = values["coordinator"]
        values.update(
            server=ServerConfig(**values["server"]),
            gateway=GatewayConfig(**values["gateway"]),
            folder=Path(values["folder"]),
            coordinator=None if coordinator is None else Path(coordinator),
        )
        return cls(**values)


# ---- a worker ----


class _EngineConnection:
    """Follows the engines that the parent tells of."""

    def __init__(self, client: AsyncEngine, link: ParentLink) -> None:
        from penstock.serving.cluster.control_channel import LimitsSet

        self._client = client
        self._link = link
        self._address = ""
        self._connecting: asyncio.Task[None] | None = None
        client.on_hang = self._report_hang
        client.on_configured = lambda limits: link.send(LimitsSet(limits))

    def ready(self, address: str, starts: int) -> None:
        """Connect to the engine at `address`, the `starts`-th one."""
        self.close()
        self._address = address
        self._client.engine_starts = starts - 1
        self._connecting = asyncio.create_task(self._connect(address))

    def lost(self, reason: str) -> None:
        self.close()
        self._client.engine_lost(reason)

    def gone(self, reason: str) -> None:
        self.close()
        self._client.engine_gone(reason)

    def close(self) -> None:
        """Stop connecting, if it is under way."""
        if self._connecting is not None:
            self._connecting.cancel()

    async def _connect(self, address: str) -> None:
        from penstock.core.transport import ZmqClientEndpoint

        endpoint = ZmqClientEndpoint(address)
        try:
            await self._client.connect(endpoint, timeout_s=60.0)
        except EngineDeadError as error:
            endpoint.close()
            self._report_hang(error.message)
        except BaseException:
            endpoint.close()
            raise

    def _report_hang(self, reason: str) -> None:
        from penstock.serving.cluster.control_channel import EngineHung

        self._link.send(EngineHung(self._address, reason))


async def worker_main(link: ParentLink, recorder: Recorder, settings: WorkerSettings) -> int:
    """One gateway process, until the parent says to end."""
    from penstock.serving.gateway.metrics_server import create_metrics_app
    from penstock.serving.gateway.routes.operations import metrics_page
    from penstock.serving.gateway.server import Ending, serve
    from penstock.serving.gateway.stores.coordinator_client import CoordinatorLink

    client = await asyncio.to_thread(make_client, settings.folder, settings.server, lambda reason: None)
    engine = _EngineConnection(client, link)
    ending = Ending()
    coordinator = None if settings.coordinator is None else CoordinatorLink(settings.coordinator, recorder)
    try:
        if coordinator is not None:
            await coordinator.start()
        app = await make_app(
            {settings.model_name: client}, settings.server, settings.gateway, recorder, shared=_shared(coordinator)
        )
        app.state.gateway.scrape = link.scrape
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve(
                app,
                settings.server,
                settings.gateway,
                sock=socket.socket(fileno=settings.listener),
                metrics_app=create_metrics_app(lambda: metrics_page(app.state.gateway), settings.gateway.metrics_host),
                metrics_sock=None
                if settings.metrics_listener is None
                else socket.socket(fileno=settings.metrics_listener),
                on_started=started.set_result,
                ending=ending,
            )
        )
        talking = asyncio.create_task(_talk(link, started, engine, client, ending))
        try:
            await serving
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
    finally:
        engine.close()
        await client.close()
        if coordinator is not None:
            await coordinator.close()
    await link.close(client.finished_requests)
    return 0


async def _talk(
    link: ParentLink, started: asyncio.Future[str], engine: _EngineConnection, client: AsyncEngine, ending: Ending
) -> None:
    """Listen to the parent once requests are accepted; without it there is nothing to serve for."""
    from penstock.serving.cluster.control_channel import Drain, EngineGone, EngineLost, EngineReady, Hurry, LimitsSet

    def on_message(message: ToChild) -> None:
        match message:
            case EngineReady(address, starts):
                engine.ready(address, starts)
            case EngineLost(reason):
                engine.lost(reason)
            case EngineGone(reason):
                engine.gone(reason)
            case LimitsSet(limits):
                client.remember_limits(limits)
            case Drain(linger):
                (ending.terminate if linger else ending.stop).set()
            case Hurry():
                ending.hurry.set()

    await started
    await link.serve(on_message, lambda: client.finished_requests)
    ending.stop.set()
    ending.hurry.set()


def _shared(link: CoordinatorLink | None) -> SharedStores | None:
    from penstock.serving.gateway.services import SharedStores
    from penstock.serving.gateway.stores.coordinator_client import (
        CoordinatorCacheStore,
        CoordinatorFlightStore,
        CoordinatorLimitStore,
    )

    if link is None:
        return None
    return SharedStores(CoordinatorLimitStore(link), CoordinatorCacheStore(link), CoordinatorFlightStore(link))


# ---- the coordinator ----


async def coordinator_main(link: ParentLink, recorder: Recorder, settings: WorkerSettings) -> int:
    """The coordinator, until the parent says to end. Signals are the parent's to act on: the workers end first."""
    from penstock.serving.cluster.control_channel import Drain
    from penstock.serving.gateway.cache.local_flight_store import LocalFlightStore
    from penstock.serving.gateway.cache.memory_store import MemoryStore
    from penstock.serving.gateway.limits.local_store import LocalLimitStore
    from penstock.serving.gateway.stores.coordinator_server import CoordinatorServer

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    assert settings.coordinator is not None  # noqa: S101  for the type checker: the parent starts it only with a path
    cache = MemoryStore(int(settings.gateway.response_cache_mib * 2**20), recorder)
    server = CoordinatorServer(LocalLimitStore(), cache, LocalFlightStore())
    await server.start(settings.coordinator)
    end = asyncio.Event()
    talking = asyncio.create_task(
        link.serve(lambda message: end.set() if isinstance(message, Drain) else None, lambda: 0)
    )
    waiting = asyncio.create_task(end.wait())
    await asyncio.wait((talking, waiting), return_when=asyncio.FIRST_COMPLETED)
    for task in (talking, waiting):
        task.cancel()
    await asyncio.gather(talking, waiting, return_exceptions=True)
    await server.close()
    await link.close(0)
    return 0


# ---- both ----


def main(arguments: list[str]) -> int:
    """A child process. Exit status 0 when it was told to end, 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="python -m penstock.launch_worker", description="A process of the gateway.")
    parser.add_argument("kind", choices=("worker", "coordinator"))
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args(arguments)
    from penstock.core.process import exit_when_parent_dies

    exit_when_parent_dies(options.parent_pid)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_child(options.kind, options.control_fd))


async def _child(kind: str, control_fd: int) -> int:
    from penstock.serving.cluster.parent_link import ParentLink
    from penstock.telemetry.recorder import Recorder

    recorder = Recorder()
    link = await ParentLink.open(control_fd, recorder)
    settings = WorkerSettings.from_message(await link.begin())
    configure_logging(settings.server.log_level, settings.server.log_format)
    try:
        return await (worker_main if kind == "worker" else coordinator_main)(link, recorder, settings)
    except PenstockError as error:
        await link.fail(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
