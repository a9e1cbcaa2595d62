"""Real servers for tests: Redis and PostgreSQL on free loopback ports, one of each per session and directory of tests.

A directory's conftest takes what it needs: `from tests.services import postgres_server, redis_server`. Without the program a test is
skipped with the reason. A test that stops a server starts it again; `fresh()` gives a test an empty store of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HOST = "127.0.0.1"
PASSWORD = "pn-test-password"
_START_TIMEOUT_S = 60.0
_PORT_ATTEMPTS = 5


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `ready`; raises RuntimeError with the server's log when it ends or does not get there."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


class _Server:
    """A child process with a folder of its own. `url` stays the same over stop and start."""

    def __init__(self, name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"pn-{name}-"))
        self.log = self.folder / "log"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers. Nothing happens when it runs already."""
        if self._process is not None:
            return
        attempts = _PORT_ATTEMPTS if self.port == 0 else 1
        for attempt in range(attempts):
            port = self.port or _free_port()
            with self.log.open("ab") as log:
                process = self._spawn(port, log.fileno())
            try:
                _wait(lambda port=port: self._answers(port), process, self.log)  # type: ignore[misc]
            except RuntimeError:
                # Another program may have taken the port between our look and the server's bind.
                process.kill()
                process.wait()
                if attempt == attempts - 1:
                    raise
                continue
            self.port, self._process = port, process
            return

    def stop(self) -> None:
        """End it at once; connections break. Nothing happens when it does not run."""
        if self._process is None:
            return
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay open and nothing answers."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End `pause`."""
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop and remove everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    _stop_signal = signal.SIGTERM

    def _spawn(self, port: int, log: int) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _answers(self, port: int) -> bool:
        raise NotImplementedError

    def _pids(self) -> list[int]:
        """The process and its children (PostgreSQL has one per connection)."""
        if self._process is None:
            return []
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        with contextlib.suppress(FileNotFoundError):
            return [pid, *map(int, children.read_text().split())]
        return [pid]


class RedisServer(_Server):
    """Redis without persistence: a restart forgets everything."""

    def __init__(self, program: str) -> None:
        super().__init__("redis")
        self._program = program

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def fresh(self) -> str:
        """Empty the server; its URL."""
        self._ask(self.port, b"FLUSHALL\r\n")
        return self.url

    def _spawn(self, port: int, log: int) -> subprocess.Popen[bytes]:
        options = ["--bind", HOST, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        return subprocess.Popen([self._program, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _answers(self, port: int) -> bool:
        try:
            return self._ask(port, b"PING\r\n") == b"+PONG\r\n"
        except OSError:
            return False

    @staticmethod
    def _ask(port: int, command: bytes) -> bytes:
        with socket.create_connection((HOST, port), timeout=5) as connection:
            connection.sendall(command)
            return connection.recv(64)


class PostgresServer(_Server):
    """PostgreSQL with password authentication. It refuses to run as root: then it runs as the user postgres or nobody."""

    # Immediate shutdown, as in a crash: nobody is asked and nothing is written; the next start recovers from the log.
    _stop_signal = signal.SIGQUIT

    def __init__(self, programs: Path) -> None:
        super().__init__("postgres")
        self._programs = programs
        self._user = _unprivileged_user()
        self._numbers = itertools.count()
        self._given_back: list[str] = []
        self._data = self.folder / "data"
        password_file = self.folder / "password"
        password_file.write_text(PASSWORD)
        self.log.touch()
        if self._user is not None:
            for path in (self.folder, password_file, self.log):
                shutil.chown(path, self._user)
        self._run(
            "initdb", "-D", str(self._data), "-U", "penstock", "--encoding=UTF8", "--no-locale", "--no-sync",
            "--auth=scram-sha-256", f"--pwfile={password_file}",
        )  # fmt: skip

    @property
    def url(self) -> str:
        """The database "postgres", which all tests share; `fresh` is for tables."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://penstock:{PASSWORD}@{HOST}:{self.port}/{database}"

    def fresh(self) -> str:
        """URL of an empty database: a new one, or one that was given back."""
        if self._given_back:
            name = self._given_back.pop()
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            self.sql(f"SELECT pg_terminate_backend(pid) {others}", name)
            self.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC", name)
            return self.url_of(name)
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url_of(name)

    def give_back(self, url: str) -> None:
        """A database from `fresh` that is not used any more: emptying it is quicker than making another."""
        self._given_back.append(url.rpartition("/")[2])

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql prints for a statement."""
        return self._run(
            "psql", "-X", "-q", "-A", "-t", "-h", HOST, "-p", str(self.port), "-U", "penstock", "-d", database,
            "-v", "ON_ERROR_STOP=1", "-c", statement,
        ).strip()  # fmt: skip

    def _run(self, program: str, *arguments: str) -> str:
        result = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            env=self._environment(),
            user=self._user,
            cwd=self.folder,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{program} failed: {result.stderr}")
        return result.stdout

    def _spawn(self, port: int, log: int) -> subprocess.Popen[bytes]:
        settings = ("unix_socket_directories=", "fsync=off", "max_connections=60", "shared_buffers=16MB", "jit=off")
        options = [option for setting in settings for option in ("-c", setting)]
        command = [str(self._programs / "postgres"), "-D", str(self._data), "-h", HOST, "-p", str(port), *options]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment(),
            user=self._user,
            cwd=self.folder,
        )

    def _answers(self, port: int) -> bool:
        command = [str(self._programs / "pg_isready"), "-q", "-h", HOST, "-p", str(port)]
        return subprocess.run(command, check=False, timeout=30).returncode == 0

    @staticmethod
    def _environment() -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", ""), "PGPASSWORD": PASSWORD, "LC_ALL": "C"}


def _unprivileged_user() -> str | None:
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def find_postgres() -> Path | None:
    """The folder with PostgreSQL's programs, the newest version's."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    if versions:
        return versions[-1].parent
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A running Redis; mark tests that use it `redis`."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (make system-deps)")
    server = RedisServer(program)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running PostgreSQL; mark tests that use it `postgresql`."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (make system-deps)")
    server = PostgresServer(programs)
    try:
        server.start()
        yield server
    finally:
        server.close()
