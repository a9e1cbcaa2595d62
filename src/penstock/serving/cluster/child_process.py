"""A child process in a session of its own, ended together with everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

POLL_INTERVAL_S = 0.05


class ChildProcess:
    """Starts `command` at once. Its output goes where ours goes; its standard input is empty; Ctrl-C does not reach it. It inherits the
    file descriptors `pass_fds`, under the same numbers.

    Raises OSError when it cannot be started. `end` must be called, also after the process exited by itself: it reaps the process and
    kills what is left of its group.
    """

    def __init__(self, command: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        self._process = subprocess.Popen(  # noqa: S603  the composition root writes the command
            list(command), stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=tuple(pass_fds)
        )
        self.pid = self._process.pid
        self._ended = False

    def exited(self) -> bool:
        """True when the process is over. Leaves it unreaped, so that its process group's id cannot be given to others."""
        if self._ended:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the process is over; False when it still runs after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.exited():  # noqa: ASYNC110  nobody signals the end of a process but the kernel
                    await asyncio.sleep(POLL_INTERVAL_S)
        return self.exited()

    def terminate(self) -> None:
        """Ask the process to end (SIGTERM)."""
        if not self._ended:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once (SIGKILL). The process shows as exited soon after."""
        if not self._ended:
            # The group is gone when a child that just started has not yet become its leader; then the process itself is hit.
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()

    def end(self) -> int:
        """Kill what is left, reap, and return the exit status (negative: the signal). Idempotent."""
        self.kill()
        self._ended = True
        return self._process.wait()


def describe_exit(status: int, what: str = "the engine process") -> str:
    """An exit status in words."""
    if status >= 0:
        return f"{what} exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"{what} was ended by {name}{hint}"
