"""One engine process: started, watched, restarted, ended. Real processes; waiting times are injected."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import psutil
import pytest

from penstock.core.errors import ConfigError
from penstock.core.transport import ClientEndpoint, SocketDirectory
from penstock.core.types import Hello
from penstock.serving.cluster.child_process import ChildProcess, describe_exit
from penstock.serving.cluster.supervisor import EngineSupervisor, backoff_s
from penstock.testing.fake_engine_process import FakeEngineOptions

PYTHON = sys.executable


@dataclass
class Journal:
    """What the callbacks reported."""

    ready: list[ClientEndpoint] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    finished: int = 0

    def on_ready(self, endpoint: ClientEndpoint, hello: Hello) -> None:
        assert hello.model.architecture == "fake"
        self.ready.append(endpoint)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)

    def close(self) -> None:
        for endpoint in self.ready:
            endpoint.close()


def fake_command(options: FakeEngineOptions) -> list[str]:
    return [
        PYTHON,
        "-m",
        "penstock.testing.fake_engine_process",
        "--options",
        msgspec.json.encode(options).decode(),
    ]


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal()
    yield journal
    journal.close()


@pytest.fixture
def sockets() -> Iterator[SocketDirectory]:
    with SocketDirectory() as directory:
        yield directory


def make_supervisor(
    command: list[str],
    journal: Journal,
    sockets: SocketDirectory,
    *,
    max_restarts: int = 5,
    startup_timeout_s: float = 30.0,
    stop_grace_s: float = 5.0,
) -> EngineSupervisor:
    return EngineSupervisor(
        command,
        new_address=sockets.new_address,
        on_ready=journal.on_ready,
        on_lost=journal.lost.append,
        on_gone=journal.gone.append,
        finished_requests=lambda: journal.finished,
        max_restarts=max_restarts,
        startup_timeout_s=startup_timeout_s,
        stop_grace_s=stop_grace_s,
        sleep=journal.sleep,
    )


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def until(condition: object, timeout_s: float = 15.0) -> None:
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_start_and_stop_leave_no_process(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor(fake_command(FakeEngineOptions()), journal, sockets)
    hello = await supervisor.start()
    assert hello.timeline == [("load", 0.0)]
    pid = supervisor.engine_pid
    assert pid is not None
    assert alive(pid)
    await supervisor.stop()
    await supervisor.stop()
    assert not psutil.pid_exists(pid)
    assert len(journal.ready) == 1
    assert (journal.lost, journal.gone) == ([], [])


async def test_a_killed_engine_is_started_again(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor(fake_command(FakeEngineOptions()), journal, sockets)
    await supervisor.start()
    first = supervisor.engine_pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: len(journal.ready) == 2)
    assert supervisor.engine_pid not in {None, first}
    assert len(journal.lost) == 1
    assert "SIGKILL" in journal.lost[0]
    assert journal.slept == [0.5]
    await supervisor.stop()


async def test_kill_restarts_an_engine_that_hangs_even_when_it_is_stopped(
    journal: Journal, sockets: SocketDirectory
) -> None:
    supervisor = make_supervisor(fake_command(FakeEngineOptions()), journal, sockets)
    await supervisor.start()
    first = supervisor.engine_pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    supervisor.kill("it made no progress")
    await until(lambda: len(journal.ready) == 2)
    assert journal.lost == ["the engine restarts: it made no progress"]
    assert not psutil.pid_exists(first)
    await supervisor.stop()


async def test_back_off_grows_and_then_it_gives_up(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor(fake_command(FakeEngineOptions()), journal, sockets, max_restarts=2)
    await supervisor.start()
    for starts in (1, 2, 3):
        await until(lambda starts=starts: len(journal.ready) == starts)
        assert supervisor.engine_pid is not None
        os.kill(supervisor.engine_pid, signal.SIGKILL)
    await until(lambda: bool(journal.gone))
    assert journal.slept == [0.5, 1.0]
    assert len(journal.lost) == 3
    assert "2 restarts" in journal.gone[0]
    assert supervisor.engine_pid is None
    await supervisor.stop()


async def test_a_finished_request_resets_the_count(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor(fake_command(FakeEngineOptions()), journal, sockets, max_restarts=1)
    await supervisor.start()
    for starts in (1, 2, 3):
        await until(lambda starts=starts: len(journal.ready) == starts)
        journal.finished += 1
        assert supervisor.engine_pid is not None
        os.kill(supervisor.engine_pid, signal.SIGKILL)
    await until(lambda: len(journal.ready) == 4)
    assert journal.gone == []
    assert journal.slept == [0.5] * 3
    await supervisor.stop()


async def test_a_start_that_fails_says_why_and_is_not_repeated(journal: Journal, sockets: SocketDirectory) -> None:
    options = FakeEngineOptions(startup_failure="not enough memory: lower --kv-cache-gib")
    supervisor = make_supervisor(fake_command(options), journal, sockets)
    with pytest.raises(ConfigError, match="lower --kv-cache-gib"):
        await supervisor.start()
    assert supervisor.engine_pid is None
    assert (journal.ready, journal.slept) == ([], [])


async def test_an_exit_before_hello_is_a_failed_start(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor([PYTHON, "-c", "import sys; sys.exit(5)"], journal, sockets)
    with pytest.raises(ConfigError, match="status 5"):
        await supervisor.start()


async def test_a_start_that_takes_too_long_is_ended(journal: Journal, sockets: SocketDirectory) -> None:
    command = fake_command(FakeEngineOptions(startup_s=60))
    supervisor = make_supervisor(command, journal, sockets, startup_timeout_s=0.3)
    with pytest.raises(ConfigError, match="not ready after"):
        await supervisor.start()
    assert supervisor.engine_pid is None


async def test_a_command_that_does_not_exist(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor(["/no/such/program"], journal, sockets)
    with pytest.raises(ConfigError, match="/no/such/program"):
        await supervisor.start()


async def test_cancelling_a_start_leaves_no_process(journal: Journal, sockets: SocketDirectory) -> None:
    supervisor = make_supervisor(fake_command(FakeEngineOptions(startup_s=60)), journal, sockets)
    start = asyncio.create_task(supervisor.start())
    await until(lambda: supervisor.engine_pid is not None)
    pid = supervisor.engine_pid
    assert pid is not None
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    assert not psutil.pid_exists(pid)


DEAF = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print(child.pid, flush=True); time.sleep(60)"
)


async def test_a_process_that_ignores_sigterm_is_killed_with_its_children() -> None:
    child = ChildProcess([PYTHON, "-c", DEAF])
    await until(lambda: bool(psutil.Process(child.pid).children()))
    grandchild = psutil.Process(child.pid).children()[0].pid
    child.terminate()
    begin = time.monotonic()
    assert not await child.wait(0.2)
    assert time.monotonic() - begin < 5
    assert child.end() == -signal.SIGKILL
    assert child.end() == -signal.SIGKILL
    await until(lambda: not alive(grandchild))


async def test_what_an_exited_process_left_behind_is_killed() -> None:
    script = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); sys.exit(4)"
    )
    child = ChildProcess([PYTHON, "-c", script])
    group = child.pid
    assert await child.wait(10)
    assert child.exited()
    assert child.end() == 4
    await until(lambda: not [p for p in psutil.process_iter() if group_of(p.pid) == group and alive(p.pid)])


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def test_exit_in_words() -> None:
    assert describe_exit(3) == "the engine process exited with status 3"
    assert "SIGKILL" in describe_exit(-9)
    assert "SIGSEGV" in describe_exit(-11)


def test_back_off_is_bounded() -> None:
    assert [backoff_s(count) for count in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff_s(10_000) == 30
