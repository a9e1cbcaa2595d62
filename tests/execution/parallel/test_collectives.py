"""Collectives between two real processes: the same numbers on both, over gloo and shared memory, and a death that is noticed."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from penstock.execution.parallel.shared_memory import SharedMemoryCollectives, shared_memory_available

RANK = Path(__file__).with_name("collective_rank.py")

needs_shared_memory = pytest.mark.skipif(not shared_memory_available(), reason="no memory shared by processes here")


def join(size: int, patience_seconds: float = 30.0) -> list[SharedMemoryCollectives]:
    """A group of threads."""
    name, barrier = f"test-{secrets.token_hex(8)}", threading.Barrier(size, timeout=30)

    def meet() -> None:
        barrier.wait()

    def one(rank: int) -> SharedMemoryCollectives:
        return SharedMemoryCollectives.join(name, rank, size, barrier=meet, patience_seconds=patience_seconds)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@needs_shared_memory
def test_two_processes(tmp_path: Path) -> None:
    name, store = f"test-{secrets.token_hex(8)}", str(tmp_path / "store")
    command = [sys.executable, "-W", "error", str(RANK)]
    ranks = [
        subprocess.Popen([*command, str(rank), store, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    (out, errors), (other_out, other_errors) = [rank.communicate(timeout=60) for rank in ranks]
    assert other_out.split() == ["TorchCollectives", "SharedMemoryCollectives", "dying"], other_errors
    assert out.split()[:2] == ["TorchCollectives", "SharedMemoryCollectives"], errors
    noticed = re.search(r"noticed after ([0-9.]+) s: another rank is gone \(rank 0 of the 2 ranks", out)
    assert noticed is not None, (out, errors)
    assert float(noticed[1]) < 1.0
    assert not list(Path("/dev/shm").glob(f"*{name}*"))  # noqa: S108


@needs_shared_memory
def test_many_short_rounds_among_more_ranks_than_cores() -> None:
    size = 5
    group = join(size)

    def work(rank: int) -> torch.Tensor:
        total = torch.zeros(3)
        for step in range(300):
            tensor = torch.tensor([float(rank), float(step), 1.0])
            group[rank].all_reduce(tensor)
            total += tensor
        return total

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(work, range(size)))
    expected = torch.tensor([300 * 10.0, size * sum(range(300)), 300 * 5.0])
    assert all(torch.equal(result, expected) for result in results)


@needs_shared_memory
def test_the_sum_has_the_order_of_ranks() -> None:
    size = 3
    group = join(size)
    parts = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) * 10.0**rank for rank in range(size)]

    def work(rank: int) -> torch.Tensor:
        tensor = parts[rank].clone()
        group[rank].all_reduce(tensor)
        return tensor

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(work, range(size)))
    assert all(torch.equal(result, (parts[0] + parts[1]) + parts[2]) for result in results)


@needs_shared_memory
def test_a_rank_that_left_and_one_that_is_late() -> None:
    first, second = join(2)
    second.leave()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="this rank has left"):
        second.all_reduce(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"another rank is gone \(rank 0 of the 2 ranks"):
        first.all_reduce(torch.ones(2))
    assert time.monotonic() - start < 1.0
    first, second = join(2, patience_seconds=0.1)
    with pytest.raises(RuntimeError, match="did not come in time"):
        first.all_gather(torch.ones(2))
    second.leave()


@needs_shared_memory
def test_a_name_that_is_taken() -> None:
    file = Path("/dev/shm") / f"penstock-test-{secrets.token_hex(8)}"  # noqa: S108
    file.write_text("of somebody else")
    try:
        with pytest.raises(RuntimeError, match=r"rank 0 of 2 cannot share memory with the others: .*File exists"):
            SharedMemoryCollectives.join(file.name.removeprefix("penstock-"), 0, 2, barrier=lambda: None)
        assert file.read_text() == "of somebody else"
    finally:
        file.unlink()
    with pytest.raises(ValueError, match="no name"):
        SharedMemoryCollectives.join("../x", 0, 2, barrier=lambda: None)
