"""What a child process does so that it never outlives the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_ORPHAN_EXIT_STATUS = 3


def exit_when_parent_dies(parent_pid: int, *, interval_s: float = 0.5) -> threading.Thread:
    """End this process at once when the process `parent_pid` is no longer its parent.

    Call it first thing in the child. A daemon thread looks every `interval_s` seconds. On Linux the kernel is asked as well (prctl
    PR_SET_PDEATHSIG), which works even while the child is stopped or holds the interpreter; the kernel's signal is bound to the
    parent's starting thread, so start children from a thread that lives as long as they do.

    The exit runs no clean-up handlers: an orphan has nobody to answer, and handlers could hang.
    """
    if sys.platform == "linux":
        # A kernel that refuses leaves the thread below, which is enough.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(interval_s)
        os._exit(_ORPHAN_EXIT_STATUS)

    thread = threading.Thread(target=watch, name="parent-watch", daemon=True)
    thread.start()
    return thread
