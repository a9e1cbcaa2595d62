"""Which steps are recorded, and where their logits are. That a replay is right: test_cuda_graphs.py, test_device_executor.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.execution.runner.accelerator import HostAccelerator
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.step_graphs import StepGraphs, verification_lengths

VOCAB_SIZE = 7


class Echo:
    """A model whose logits are its input ids."""

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return input_ids.float().unsqueeze(1)

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        assert out is not None
        return out.copy_(hidden.expand(-1, VOCAB_SIZE))


def make_graphs(
    lengths: list[int], *, largest: int = 8, max_tokens: int = 64, max_seq_len: int = 64
) -> tuple[StepGraphs, DeviceBatch]:
    accelerator = HostAccelerator()
    batch = DeviceBatch(
        accelerator, max_slots=8, max_requests=8, max_tokens=max_tokens, max_model_len=64, block_size=4, max_drafts=12
    )
    graphs = StepGraphs(
        Echo(),
        batch,
        accelerator,
        largest=largest,
        max_seq_len=max_seq_len,
        vocab_size=VOCAB_SIZE,
        lengths=lengths,
    )
    return graphs, batch


@pytest.mark.parametrize(
    ("max_drafts", "adaptive", "expected"),
    [
        (0, True, []),
        (4, False, [5]),
        (1, True, [2]),
        (3, True, [2, 4]),
        (5, True, [2, 4, 6]),
        (12, True, [2, 4, 8, 13]),
    ],
)
def test_lengths(max_drafts: int, adaptive: bool, expected: list[int]) -> None:
    assert verification_lengths(max_drafts, adaptive=adaptive) == expected


def test_a_step_takes_the_shortest_rows_that_hold_it() -> None:
    graphs, batch = make_graphs([2, 5], max_tokens=24)
    assert graphs.query_len(1, 1) == 0  # nothing is recorded yet
    graphs.capture([])
    found = [graphs.query_len(num_requests, longest) for num_requests in (1, 4, 5, 9) for longest in (1, 2, 3, 5, 6)]
    # Five requests of five tokens would be eight, for whose tokens there is no room.
    assert found == [1, 2, 5, 5, 0, 1, 2, 5, 5, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    batch.input_ids.copy_(torch.arange(24))
    places = set()
    for num_requests, query_len in ((3, 5), (8, 1), (5, 2)):
        logits = graphs.run(num_requests, query_len)
        assert logits[:, 3].tolist() == list(range(num_requests * query_len))
        places.add(logits.data_ptr())
    assert len(places) == 1
    assert graphs.account.startswith("captured 4 graphs for batches up to 8 in ")
    assert "captured 3 graphs for batches up to 4 with 4 drafts each in " in graphs.account


def test_rows_that_no_context_has_are_not_recorded() -> None:
    graphs, _ = make_graphs([2, 9], max_seq_len=8)
    graphs.capture([])
    assert (graphs.query_len(1, 2), graphs.query_len(1, 3)) == (2, 0)


def test_graphs_of_drafts_are_few() -> None:
    """However many there are of decodes."""
    recorded: list[Callable[[], None]] = []

    class Counting(HostAccelerator):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            recorded.append(function)
            return function

    accelerator = Counting()
    batch = DeviceBatch(
        accelerator, max_slots=256, max_requests=256, max_tokens=4096, max_model_len=64, block_size=4, max_drafts=12
    )
    counts = []
    for lengths in ([], verification_lengths(12, adaptive=True)):
        recorded.clear()
        graphs = StepGraphs(
            Echo(), batch, accelerator, largest=256, max_seq_len=64, vocab_size=VOCAB_SIZE, lengths=lengths
        )
        graphs.capture([])
        counts.append(len(recorded))
    assert counts == [19, 19 + 7 + 7 + 7 + 6]
