"""Keeps one engine process running: starts it, watches it, starts it again, ends it.

The engine's command gets two flags appended: `--address` (where to bind its ZmqEngineEndpoint; a new one for every start) and
`--parent-pid` (for core.process.exit_when_parent_dies). It answers Connect with Hello when it is warm, or with StartupFailed.

    start ─▶ Hello ─▶ on_ready ─▶ … exit or kill ─▶ on_lost ─▶ back-off ─▶ start ─▶ …
                                                     └─ too many restarts ─▶ on_gone
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from penstock.core.errors import ConfigError
from penstock.core.transport import ClientEndpoint, ZmqClientEndpoint
from penstock.core.types import Connect, Hello, StartupFailed
from penstock.serving.cluster.child_process import POLL_INTERVAL_S, ChildProcess, describe_exit

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
# A message that an engine sent just before it exited is read within this time.
LAST_WORDS_S = 0.3


class EngineStartError(Exception):
    """One start failed; the message is the reason in one line."""


class EngineSupervisor:
    """One engine process at a time, and a new one when it dies.

    `new_address` gives a fresh ipc:// address per start. The callbacks run in the event loop and must not block: `on_ready(endpoint,
    hello)` hands over a connected endpoint, `on_lost(reason)` says that the engine died and will be started again, `on_gone(reason)` that
    it will not. `finished_requests` counts requests that ended well: when it grew since the last death, restarts count from zero again.
    After `max_restarts` restarts without such progress it gives up. A first start that fails is not repeated.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        new_address: Callable[[], str],
        on_ready: Callable[[ClientEndpoint, Hello], None],
        on_lost: Callable[[str], None],
        on_gone: Callable[[str], None],
        finished_requests: Callable[[], int],
        max_restarts: int = 5,
        first_backoff_s: float = FIRST_BACKOFF_S,
        startup_timeout_s: float = 1800.0,
        stop_grace_s: float = 10.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.restarts = 0
        self._command = list(command)
        self._new_address = new_address
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_gone = on_gone
        self._finished_requests = finished_requests
        self._max_restarts = max_restarts
        self._first_backoff_s = first_backoff_s
        self._startup_timeout_s = startup_timeout_s
        self._stop_grace_s = stop_grace_s
        self._sleep = sleep
        self._child: ChildProcess | None = None
        self._kill_reason: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def engine_pid(self) -> int | None:
        """The engine process of now."""
        return None if self._child is None else self._child.pid

    async def start(self) -> Hello:
        """Start the engine and watch it from then on. `on_ready` was called when this returns. Raises ConfigError with the engine's
        own reason when it does not start."""
        try:
            endpoint, hello = await self._launch()
        except EngineStartError as error:
            raise ConfigError(str(error)) from error
        self._on_ready(endpoint, hello)
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return hello

    def kill(self, reason: str) -> None:
        """End an engine that hangs; it is then started again like one that died."""
        if self._child is not None:
            logger.error("killing the engine (pid %d): %s", self._child.pid, reason)
            self._kill_reason = reason
            self._child.kill()

    async def stop(self) -> None:
        """End the engine and what it started: first asked, after the grace period killed. Idempotent. No callback follows."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._child is not None:
            self._child.terminate()
            if not await self._child.wait(self._stop_grace_s):
                logger.warning("the engine did not stop within %g s and is killed", self._stop_grace_s)
            self._end_child()

    async def _supervise(self) -> None:
        try:
            await self._keep_running()
        except Exception:
            # Nobody watches the engine any more: say so rather than look healthy.
            logger.exception("the supervisor failed")
            self._end_child()
            self._on_gone("the supervisor of the engine failed")

    async def _keep_running(self) -> None:
        finished_before = 0
        while self._child is not None:
            await self._child.wait()
            reason = self._end_child()
            logger.error("the engine is gone: %s", reason)
            if self._finished_requests() > finished_before:
                self.restarts = 0
            finished_before = self._finished_requests()
            self._on_lost(f"the engine restarts: {reason}")
            if not await self._restart(reason):
                return

    async def _restart(self, reason: str) -> bool:
        """Start again until it works; False after giving up."""
        while self.restarts < self._max_restarts:
            delay_s = backoff_s(self.restarts, self._first_backoff_s)
            self.restarts += 1
            logger.info("starting the engine again in %g s (restart %d)", delay_s, self.restarts)
            await self._sleep(delay_s)
            try:
                endpoint, hello = await self._launch()
            except EngineStartError as error:
                reason = str(error)
                logger.error("the engine did not start: %s", reason)
                continue
            self._on_ready(endpoint, hello)
            return True
        logger.error("giving up on the engine after %d restarts", self.restarts)
        self._on_gone(f"it failed again after {self.restarts} restarts ({reason})")
        return False

    async def _launch(self) -> tuple[ClientEndpoint, Hello]:
        """Start a process and wait for its Hello. Raises EngineStartError; then no process is left."""
        address = self._new_address()
        command = [*self._command, "--address", address, "--parent-pid", str(os.getpid())]
        try:
            self._child = ChildProcess(command)
        except OSError as error:
            raise EngineStartError(f"cannot start {command[0]}: {error}") from error
        endpoint = ZmqClientEndpoint(address)
        try:
            endpoint.send(Connect())
            return endpoint, await self._hello(endpoint, self._child)
        # Cancellation too must leave no socket and no process behind.
        except BaseException as error:
            endpoint.close()
            status = self._end_child()
            if isinstance(error, EngineStartError) and not str(error):
                raise EngineStartError(f"{status} while it started; its messages are above") from error
            raise

    async def _hello(self, endpoint: ClientEndpoint, child: ChildProcess) -> Hello:
        """Raises EngineStartError with the engine's reason, or without a message when it exited without one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._startup_timeout_s
        while True:
            exited = child.exited()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S if exited else POLL_INTERVAL_S):
                    match await endpoint.receive():
                        case Hello() as hello:
                            return hello
                        case StartupFailed(message):
                            raise EngineStartError(message)
                    continue
            if exited:
                raise EngineStartError
            if loop.time() > deadline:
                raise EngineStartError(f"the engine was not ready after {self._startup_timeout_s:g} s")

    def _end_child(self) -> str:
        """Reap the process; why it ended."""
        child, self._child = self._child, None
        if child is None:
            return "the engine is not running"
        status = child.end()
        reason, self._kill_reason = self._kill_reason, None
        return reason if reason is not None else describe_exit(status)


def backoff_s(restarts: int, first_s: float = FIRST_BACKOFF_S, most_s: float = MAX_BACKOFF_S) -> float:
    """Seconds to wait before the next start: doubled with each restart so far, bounded."""
    return float(min(first_s * 2.0 ** min(restarts, 32), most_s))
