"""One child process behind a control channel, and its successors: started, watched, started again.

    start ─▶ Begin ─▶ Started ─▶ Beat, Beat, … ─▶ exit, closed channel or silence ─▶ on_ended ─▶ back-off ─▶ start ─▶ …

The command gets `--control-fd` (its end of the channel) and `--parent-pid` (for core.process.exit_when_parent_dies) appended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from penstock.core.errors import ConfigError
from penstock.core.framing import FrameError
from penstock.serving.cluster.child_process import ChildProcess, describe_exit
from penstock.serving.cluster.control_channel import (
    BEAT_INTERVAL_S,
    Beat,
    Begin,
    Collected,
    ControlChannel,
    Drain,
    Started,
    StartFailed,
    ToChild,
    ToParent,
)
from penstock.serving.cluster.supervisor import backoff_s
from penstock.telemetry.aggregate import Snapshot

logger = logging.getLogger(__name__)

# A child that lived for so long before it ended is started again at once; the others wait longer and longer.
STABLE_S = 60.0
STARTUP_TIMEOUT_S = 120.0
SILENCE_LIMIT_S = 20.0
# After its channel closed or Drain is done, a child has so long to exit.
EXIT_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class ProcessEvents:
    """What is told, in the event loop. `started`: the child serves. `message`: everything else than signs of life. `ended`: the child is
    over; `last` and `finished` are what it had counted."""

    started: Callable[[KeptProcess], None]
    message: Callable[[KeptProcess, ToParent], None]
    ended: Callable[[KeptProcess, Snapshot, int], None]


class KeptProcess:
    """`snapshot` and `finished_requests` are the latest of the process of now. `pid` is None while there is none. Use `start`, and at the
    end `finish`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        begin: Begin,
        events: ProcessEvents,
        *,
        pass_fds: Sequence[int] = (),
        silence_limit_s: float = SILENCE_LIMIT_S,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.snapshot = Snapshot()
        self.finished_requests = 0
        self.serving = False
        self._command = list(command)
        self._begin = begin
        self._events = events
        self._pass_fds = tuple(pass_fds)
        self._silence_limit_s = silence_limit_s
        self._startup_timeout_s = startup_timeout_s
        self._sleep = sleep
        self._child: ChildProcess | None = None
        self._channel: ControlChannel[ToParent] | None = None
        self._silent_s = 0.0
        self._restarts = 0
        self._finishing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Start the process; from then on it is kept. Raises ConfigError with the reason when it does not start."""
        try:
            await self._launch()
        except _StartError as error:
            raise ConfigError(str(error)) from None
        self._task = asyncio.create_task(self._keep_running(), name=f"keep {self.name}")

    def send(self, message: ToChild) -> None:
        """Tell the process of now; nobody hears it while there is none."""
        if self._channel is not None:
            self._channel.send(message)

    async def finish(self, timeout_s: float, *, linger: bool = False) -> bool:
        """Ask the process to end and wait for it; False when it had to be killed after `timeout_s`. It is not started again."""
        self.leave(linger=linger)
        child = self._child
        in_time = True
        if child is not None and not (in_time := await child.wait(timeout_s)):
            logger.warning("%s did not end within %g s and is killed", self.name, timeout_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._end()
        return in_time

    def leave(self, *, linger: bool = False) -> None:
        """Ask the process to end when it is done; do not start it again."""
        if not self._finishing:
            self._finishing = True
            self.send(Drain(linger))

    # ---- one process ----

    async def _launch(self) -> None:
        """Start a process and wait until it serves. Raises _StartError; then no process is left."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            flags = ["--control-fd", str(descriptor), "--parent-pid", str(os.getpid())]
            try:
                self._child = ChildProcess([*self._command, *flags], (descriptor, *self._pass_fds))
            except OSError as error:
                ours.close()
                raise _StartError(f"cannot start {self.name}: {error}") from None
        try:
            self._channel = await ControlChannel[ToParent].open(ours, ToParent)
            self._channel.send(self._begin)
            async with asyncio.timeout(self._startup_timeout_s):
                await self._until_started(self._child, self._channel)
        # Cancellation too must leave no process behind.
        except BaseException as error:
            status = self._end()
            if isinstance(error, TimeoutError):
                raise _StartError(f"{self.name} was not ready after {self._startup_timeout_s:g} s") from None
            if isinstance(error, _StartError) and not str(error):
                raise _StartError(f"{status} while it started; its messages are above") from None
            raise
        self.serving = True
        self._events.started(self)

    async def _until_started(self, child: ChildProcess, channel: ControlChannel[ToParent]) -> None:
        while True:
            try:
                message = await channel.receive()
            except (OSError, FrameError, msgspec.MsgspecError):
                message = None
            match message:
                case Started():
                    return
                case StartFailed(reason):
                    raise _StartError(reason)
                case None:
                    await child.wait(EXIT_GRACE_S)
                    raise _StartError

    async def _keep_running(self) -> None:
        while True:
            began = asyncio.get_running_loop().time()
            await self._watch()
            if self._finishing:
                return
            if asyncio.get_running_loop().time() - began >= STABLE_S:
                self._restarts = 0
            reason = self._end()
            logger.error("%s is gone: %s", self.name, reason)
            while not self._finishing:
                delay_s = backoff_s(self._restarts) if self._restarts else 0.0
                self._restarts += 1
                await self._sleep(delay_s)
                try:
                    await self._launch()
                    break
                except _StartError as error:
                    logger.error("%s did not start: %s", self.name, error)

    async def _watch(self) -> None:
        """Returns when the process is over, or when it hangs (then it was killed)."""
        child, channel = self._child, self._channel
        if child is None or channel is None:
            return
        reading = asyncio.create_task(self._read(channel))
        try:
            self._silent_s = 0.0
            while not child.exited():
                before = asyncio.get_running_loop().time()
                await asyncio.wait((reading,), timeout=BEAT_INTERVAL_S / 4)
                if reading.done():
                    reading.result()
                    await child.wait(EXIT_GRACE_S)
                    return
                # When this process stood still itself, nobody else is to blame for the silence.
                self._silent_s += min(asyncio.get_running_loop().time() - before, BEAT_INTERVAL_S)
                if self._silent_s > self._silence_limit_s:
                    logger.error(
                        "%s (pid %d) said nothing for %.0f s and is killed", self.name, child.pid, self._silent_s
                    )
                    return
            await asyncio.wait((reading,), timeout=EXIT_GRACE_S)  # its last words
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, channel: ControlChannel[ToParent]) -> None:
        """Returns when the process closed its end, or said what is not in the protocol."""
        try:
            while (message := await channel.receive()) is not None:
                self._silent_s = 0.0
                if isinstance(message, Beat):
                    self.finished_requests, self.snapshot = message.finished_requests, message.snapshot
                    continue
                if isinstance(message, Collected):
                    self.snapshot = message.snapshot
                self._events.message(self, message)
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            logger.error("the channel to %s broke: %s", self.name, error)

    def _end(self) -> str:
        """Kill and reap what is left, and tell what it had counted. Why it ended."""
        was_serving, self.serving = self.serving, False
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.abort()
        child, self._child = self._child, None
        if child is None:
            return "it is not running"
        reason = describe_exit(child.end(), self.name)
        if was_serving:
            last, finished = self.snapshot, self.finished_requests
            self.snapshot, self.finished_requests = Snapshot(), 0
            self._events.ended(self, last, finished)
        return reason


class _StartError(Exception):
    """One start failed; the message is the reason in one line, empty when the process ended without one."""
