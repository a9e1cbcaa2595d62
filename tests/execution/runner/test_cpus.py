"""The number of threads, and binding to CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.execution.runner import cpus
from penstock.execution.runner.cpus import bind_to_cpus, default_threads, divide_cpus, parse_cpus


@pytest.mark.parametrize(
    ("text", "expected"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), (" 2 ,4-5", {2, 4, 5}), ("7-7", {7})]
)
def test_parse_cpus(text: str, expected: set[int]) -> None:
    assert parse_cpus(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "0,,1", "1-2-3", "0-99999999999"])
def test_a_malformed_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cpus"):
        parse_cpus(text)


def test_a_thread_per_physical_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}"
        folder.mkdir()
        (folder / "siblings").write_text(siblings + "\n")
    monkeypatch.setattr(cpus, "_TOPOLOGY", str(tmp_path / "cpu{}" / "siblings"))
    monkeypatch.setattr(cpus, "_allowed_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(cpus, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    assert default_threads() == 2
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert default_threads() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert default_threads() == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity (Linux)")
def test_binding_holds_for_threads_that_start_later() -> None:
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    chosen = max(allowed)

    def bind_and_start_a_thread() -> None:
        bind_to_cpus(str(chosen))
        inner = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        inner.start()
        inner.join()

    thread = threading.Thread(target=bind_and_start_a_thread)
    thread.start()
    thread.join()
    assert seen == [{chosen}]
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity (Linux)")
def test_a_cpu_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="may not use CPU 65000"):
        bind_to_cpus("65000")


def test_native_kernels_and_torch_share_one_pool() -> None:
    """A second OpenMP runtime would show as more threads than were asked for."""
    script = """
import os, torch
from penstock.execution.kernels import native
if not native.native_available():
    print("absent")
    raise SystemExit
native.set_threads(2)
threads = lambda: len(os.listdir("/proc/self/task"))
torch.randn(512, 512) @ torch.randn(512, 512)
torch.randn(1_000_000).exp()
with_torch = threads()
from penstock.execution.kernels.linear import NativeLinear, pack_float
NativeLinear([pack_float(torch.randn(512, 512), None)])(torch.randn(64, 512))
torch.randn(1_000_000).exp()
print(with_torch, threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "absent":
        pytest.skip("no native kernels in this installation")
    with_torch, with_both = done.stdout.split()
    assert with_torch == with_both


def test_ranks_divide_the_cpus_that_are_given() -> None:
    cpus = {0, 1, 2, 3, 8, 9, 10}
    assert [divide_cpus(cpus, part, 3) for part in range(3)] == [{0, 1}, {2, 3}, {8, 9, 10}]
    assert divide_cpus(cpus, 0, 1) == cpus
    assert [divide_cpus({4, 5}, part, 3) for part in range(3)] == [{4}, {5}, {4}], "more ranks than CPUs share them"
