"""Queues of work: what holds for all, and how the stand-in for a GPU keeps the host honest."""

from __future__ import annotations

import time

import pytest
import torch

from penstock.core.errors import IntegrityError
from penstock.execution.runner.accelerator import Accelerator, CudaAccelerator, HostAccelerator


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request: pytest.FixtureRequest) -> Accelerator:
    return HostAccelerator() if request.param == "host" else CudaAccelerator(torch.device("cuda"))


def test_numbers_go_there_and_back(accelerator: Accelerator) -> None:
    sent, fetched = accelerator.pinned((2,), torch.int64), accelerator.pinned((2,), torch.int64)
    assert sent.tolist() == fetched.tolist() == [0, 0]
    sent.copy_(torch.tensor([3, 4]))
    there = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    accelerator.send(sent, there)
    accelerator.fetch(there * 2, fetched)
    before, after = accelerator.mark(), accelerator.mark()
    after.wait()
    assert fetched.tolist() == [6, 8]
    assert before.reached()
    assert after.reached()
    assert after.seconds_since(before) >= 0
    # What was sent has been copied and may be written to.
    sent.zero_()
    accelerator.mark().wait()
    assert there.tolist() == [3, 4]


def test_recorded_work_finds_what_is_there_when_it_is_replayed(accelerator: Accelerator) -> None:
    source, target = (torch.full((1,), value, device=accelerator.device) for value in (1, 0))

    def work() -> None:
        target.copy_(source)

    work()
    replay = accelerator.record(work)
    source.fill_(7)
    assert target.item() == 1
    replay()
    assert target.item() == 7


def test_an_error_on_the_host_does_not_lose_the_device(accelerator: Accelerator) -> None:
    fetched = accelerator.pinned((1,), torch.int64)
    accelerator.fetch(torch.tensor([3], device=accelerator.device), fetched)
    assert not accelerator.is_lost()
    # It was asked after all work.
    assert fetched.item() == 3


def test_what_is_fetched_arrives_when_it_is_waited_for() -> None:
    accelerator = HostAccelerator()
    source, target = torch.tensor([1, 2]), accelerator.pinned((2,), torch.int64)
    accelerator.fetch(source, target)
    # Later work may overwrite the source.
    source.zero_()
    mark = accelerator.mark()
    assert target.tolist() == [0, 0]
    assert not mark.reached()
    mark.wait()
    assert target.tolist() == [1, 2]


def test_memory_that_is_overwritten_too_early_is_found_out() -> None:
    accelerator = HostAccelerator()
    source = accelerator.pinned((2,), torch.int64)
    accelerator.send(source, torch.ones(2, dtype=torch.int64))
    source.fill_(5)
    with pytest.raises(IntegrityError, match="before the device had copied it"):
        accelerator.mark().wait()


def test_marks_tell_time() -> None:
    accelerator = HostAccelerator()
    first = accelerator.mark()
    time.sleep(0.002)
    assert accelerator.mark().seconds_since(first) >= 0.002
