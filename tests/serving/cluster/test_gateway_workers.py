"""Workers and their parent, with real processes that do no more than speak on the control channel."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from penstock.core.errors import ConfigError
from penstock.core.transport import ZmqEngineEndpoint
from penstock.core.types import Deltas, Disconnect, Ping
from penstock.serving.cluster.control_channel import Begin, Hurry
from penstock.serving.cluster.gateway_workers import GatewayWorkers
from penstock.serving.cluster.kept_process import KeptProcess, ProcessEvents
from penstock.telemetry import metrics
from penstock.telemetry.aggregate import merge
from penstock.telemetry.recorder import Recorder

CHILD = """
import argparse, asyncio, os, signal, sys
from penstock.core.process import exit_when_parent_dies
from penstock.serving.cluster.control_channel import Drain, EngineHung, EngineReady, Hurry, Started
from penstock.serving.cluster.parent_link import ParentLink
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

async def main(options):
    recorder = Recorder()
    link = await ParentLink.open(options.control_fd, recorder)
    mode, log = (await link.begin()).settings["mode"], open(sys.argv[1], "a", buffering=1)
    if mode == "fail":
        await link.fail("no luck; try --luck")
        return 1
    if mode == "exit":
        return 7
    recorder.increment(metrics.REQUESTS, "m", "completed", by=5)
    recorder.set(metrics.HTTP_IN_FLIGHT, 2)
    end = asyncio.Event()
    def on_message(message):
        print(os.getpid(), message, file=log)
        match message:
            case Drain() if mode != "stubborn":
                end.set()
            case EngineReady("hang", _):
                link.send(EngineHung("hang", "it sleeps"))
            case EngineReady("scrape", _):
                scrapes.append(asyncio.create_task(scrape()))
            case Hurry():
                end.set()
    scrapes = []
    async def scrape():
        recorder = await link.scrape()
        print(os.getpid(), "scraped", recorder.value(metrics.REQUESTS, "m", "completed"), file=log)
    talking = asyncio.create_task(link.serve(on_message, lambda: 3))
    await end.wait()
    talking.cancel()
    await asyncio.gather(talking, return_exceptions=True)
    recorder.increment(metrics.REQUESTS, "m", "completed", by=100)
    await link.close(4)
    return 0

parser = argparse.ArgumentParser()
parser.add_argument("log")
parser.add_argument("--control-fd", type=int)
parser.add_argument("--parent-pid", type=int)
options = parser.parse_args()
exit_when_parent_dies(options.parent_pid)
sys.exit(asyncio.run(main(options)))
"""


class Parent:
    """A GatewayWorkers over children of CHILD, and what it was told."""

    def __init__(self, folder: Path, modes: list[str], coordinator: str | None, silence_limit_s: float) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.hangs: list[str] = []
        self._modes = iter(modes)
        self._silence_limit_s = silence_limit_s
        self.workers = GatewayWorkers(
            len(modes),
            lambda name, events: self._process(name, events, next(self._modes)),
            None if coordinator is None else lambda name, events: self._process(name, events, coordinator),
            on_hang=self.hangs.append,
        )

    def _process(self, name: str, events: ProcessEvents, mode: str) -> KeptProcess:
        command = [sys.executable, "-c", CHILD, str(self.log)]
        begin = Begin({"mode": mode})
        return KeptProcess(name, command, begin, events, silence_limit_s=self._silence_limit_s)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers.workers if worker.pid is not None and worker.serving]

    def heard(self, pid: int) -> list[str]:
        """What a child heard."""
        lines = [line.partition(" ") for line in self.log.read_text().splitlines()]
        return [text for number, _, text in lines if int(number) == pid]

    async def collected(self) -> Recorder:
        return merge([await self.workers.collect()])


@asynccontextmanager
async def parent(
    folder: Path, *modes: str, coordinator: str | None = None, silence_limit_s: float = 60.0
) -> AsyncIterator[Parent]:
    made = Parent(folder, list(modes), coordinator, silence_limit_s)
    try:
        yield made
    finally:
        await made.workers.stop(30.0)


async def until(condition: Callable[[], object], timeout_s: float = 40.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  other processes do not signal
            await asyncio.sleep(0.02)


async def test_workers_start_hear_of_the_engine_and_end(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", "ok", coordinator="ok") as server:
        server.workers.engine_ready("before")
        await server.workers.start()
        pids = server.pids
        assert len(set(pids)) == 2
        server.workers.engine_lost("it crashed")
        server.workers.engine_ready("ipc://2")
        await until(lambda: all(len(server.heard(pid)) == 3 for pid in pids))
        expected = ["EngineReady(address='before', starts=1)", "EngineLost(reason='it crashed')"]
        assert server.heard(pids[0]) == [*expected, "EngineReady(address='ipc://2', starts=2)"]
        assert await server.workers.stop(30.0)
        assert [server.heard(pid)[-1] for pid in pids] == ["Drain(linger=False)"] * 2
        assert server.pids == []
        assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_metrics_add_up_over_all_and_over_those_that_ended(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", "ok", coordinator="ok") as server:
        await server.workers.start()
        both = await server.collected()
        assert both.value(metrics.REQUESTS, "m", "completed") == 15
        assert both.value(metrics.HTTP_IN_FLIGHT) == 6
        assert both.value(metrics.GATEWAY_WORKERS) == 2
        await until(lambda: server.workers.finished_requests == 6)
        first, second = server.pids
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(server.pids) == 2 and first not in server.pids)
        assert second in server.pids
        after = await server.collected()
        assert after.value(metrics.REQUESTS, "m", "completed") == 20
        assert after.value(metrics.HTTP_IN_FLIGHT) == 6
        assert after.value(metrics.GATEWAY_WORKER_RESTARTS) == 1
        await until(lambda: server.workers.finished_requests == 9)
        os.kill(second, signal.SIGSTOP)
        stopped = await server.collected()
        assert stopped.value(metrics.REQUESTS, "m", "completed") == 20
        os.kill(second, signal.SIGCONT)


async def test_any_worker_can_ask_for_the_metrics_of_all(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", "ok") as server:
        await server.workers.start()
        server.workers.engine_ready("scrape")
        await until(lambda: all(server.heard(pid)[-1:] == ["scraped 10.0"] for pid in server.pids))


async def test_the_last_words_of_a_worker_count(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok") as server:
        await server.workers.start()
        pid = server.pids[0]
        server.workers.workers[0].send(Hurry())
        await until(lambda: server.pids and server.pids[0] != pid)
        total = await server.collected()
        assert total.value(metrics.REQUESTS, "m", "completed") == 110
        assert server.workers.finished_requests >= 4


async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", silence_limit_s=2.0) as server:
        await server.workers.start()
        server.workers.engine_ready("ipc://1")
        pid = server.pids[0]
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: server.pids and server.pids[0] != pid)
        assert not psutil.pid_exists(pid)
        await until(lambda: server.heard(server.pids[0]) == ["EngineReady(address='ipc://1', starts=1)"])


async def test_the_coordinator_is_replaced_too(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", coordinator="ok") as server:
        await server.workers.start()
        coordinator = server.workers.coordinator
        assert coordinator is not None
        assert coordinator.pid is not None
        pid = coordinator.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: coordinator.serving and coordinator.pid != pid)
        assert len(server.pids) == 1
        assert (await server.collected()).value(metrics.REQUESTS, "m", "completed") >= 10


async def test_a_hang_of_the_engine_is_told_once_and_only_for_the_engine_of_now(tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", "ok") as server:
        await server.workers.start()
        server.workers.engine_ready("hang")
        await until(lambda: server.hangs)
        await server.collected()  # whatever both workers said has been heard
        assert server.hangs == ["it sleeps"]


@pytest.mark.parametrize(
    ("mode", "reason"), [("fail", "no luck; try --luck"), ("exit", "exited with status 7 while it started")]
)
async def test_workers_that_cannot_start_say_why(mode: str, reason: str, tmp_path: Path) -> None:
    async with parent(tmp_path, "ok", mode) as server:
        with pytest.raises(ConfigError, match=reason):
            await server.workers.start()


async def test_a_worker_that_does_not_end_is_killed_and_a_second_signal_hurries_the_others(tmp_path: Path) -> None:
    async with parent(tmp_path, "stubborn") as server:
        await server.workers.start()
        assert not await server.workers.stop(0.5, linger=True)
    async with parent(tmp_path, "stubborn") as server:
        await server.workers.start()
        pid = server.pids[0]
        hurry = asyncio.Event()
        hurry.set()
        assert await server.workers.stop(60.0, linger=True, hurry=hurry)
        assert sorted(server.heard(pid)) == ["Drain(linger=True)", "Hurry()"]


def test_the_engine_hears_that_a_client_was_killed(tmp_path: Path) -> None:
    """Its requests must not run on for nobody until the client counts as silent."""
    code = "import sys; from penstock.core.transport import *; from penstock.core.types import *; import time\n"
    code += "client = ZmqClientEndpoint(sys.argv[1]); client.send(Ping()); time.sleep(60)"
    address = f"ipc://{tmp_path}/engine"
    engine = ZmqEngineEndpoint(address)
    try:
        with subprocess.Popen([sys.executable, "-c", code, address]) as process:
            ((client, message),) = engine.receive(20.0)
            assert message == Ping()
            process.kill()
        deadline = time.monotonic() + 20
        while engine.send(client, Deltas([])):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert engine.receive(20.0) == [(client, Disconnect())]
        assert engine.receive(0.0) == []
    finally:
        engine.close()
