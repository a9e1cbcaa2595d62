"""A child never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

CHILD = (
    "import os, sys, time; from penstock.core.process import exit_when_parent_dies; "
    "exit_when_parent_dies(int(sys.argv[1]), interval_s=0.02); print(os.getpid(), flush=True); time.sleep(60)"
)
PARENT = (
    "import subprocess, sys, os, time; "
    "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], start_new_session=True); time.sleep(60)"
)


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stopped", [False, True])
def test_a_child_ends_when_its_parent_is_killed(stopped: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    assert psutil.pid_exists(child_pid)
    if stopped:
        os.kill(child_pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(child_pid)


def test_a_child_of_another_parent_ends_at_once() -> None:
    result = subprocess.run([sys.executable, "-c", CHILD, "1"], timeout=30, check=False, capture_output=True)
    assert result.returncode == 3
