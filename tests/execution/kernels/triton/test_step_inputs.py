"""Kernels that make a step's inputs, against their twins."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from penstock.execution.kernels.triton import step_inputs
from penstock.execution.kernels.triton.step_inputs import StepTensors

SLOTS, REQUESTS, TOKENS, CONTEXT, BLOCKS = 6, 5, 600, 700, 43
SAMPLES = 12


def random_tensors(device: torch.device, block_size: int = 16) -> StepTensors:
    """Every buffer has something in it that a kernel may have to leave alone."""
    generator = torch.Generator().manual_seed(0)

    def int32(*shape: int) -> Tensor:
        return torch.randint(1000, shape, dtype=torch.int32, generator=generator).to(device)

    def int64(*shape: int) -> Tensor:
        return torch.randint(1000, shape, generator=generator).to(device)

    return StepTensors(
        block_size=block_size,
        token_ids=int32(SLOTS, CONTEXT + 1),
        block_table=int32(SLOTS, BLOCKS + 1),
        input_ids=int64(TOKENS),
        positions=int64(TOKENS),
        slot_mapping=int64(TOKENS),
        query_start=int32(REQUESTS + 1),
        seq_lens=int32(REQUESTS),
        block_tables=int32(REQUESTS, BLOCKS + 1),
        request_slots=int64(REQUESTS),
        logit_rows=int64(SAMPLES),
        sample_slots=int64(SAMPLES),
        sample_positions=int64(SAMPLES),
        sampled=int64(SAMPLES),
    )


def assert_equal(found: StepTensors, expected: StepTensors) -> None:
    for field in dataclasses.fields(StepTensors):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


@dataclasses.dataclass
class Step:
    """Requests of a step; `drafts` of those that sample, whose tokens are all computed then, -1 for the others."""

    slots: list[int]
    starts: list[int]
    counts: list[int]
    drafts: list[int]
    filled_requests: int = 0
    filled_tokens: int = 0
    query_len: int = 0

    @property
    def rows(self) -> Tensor:
        rows = torch.full((5, 8), -7, dtype=torch.int32)
        count = len(self.slots)
        rows[0, :count] = torch.tensor(self.slots)
        rows[1, :count] = torch.tensor(self.starts)
        rows[2, : count + 1] = torch.tensor([0, *self.counts]).cumsum(0)
        drafts = torch.tensor(self.drafts)
        samples = drafts + 1
        rows[3, :count] = torch.where(samples > 0, samples.cumsum(0) - samples, -1)
        rows[4, :count] = drafts.clamp(min=0)
        return rows

    @property
    def sizes(self) -> dict[str, int]:
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        return {
            "num_requests": len(self.slots),
            "num_tokens": len(self.slots) * self.query_len or sum(self.counts),
            "max_count": max(self.counts),
            "max_seq_len": max(ends),
            "filled_requests": self.filled_requests,
            "filled_tokens": self.filled_tokens,
            "query_len": self.query_len,
        }


@pytest.mark.parametrize(
    "step",
    [
        Step([3], [0], [1], [0]),
        # Decodes with padding behind them, one at the end of its context.
        Step([3, 0], [699, 15], [1, 1], [0, 0], 5, 600),
        # Chunks of several programs.
        Step([5, 1, 2], [16, 0, 300], [1, 257, 300], [0, -1, 0]),
        Step([4, 2], [31, 650], [2, 50], [-1, -1]),
        # A decode, drafts, and a prompt behind them; then drafts that were recorded with room for one more.
        Step([4, 2, 0, 1], [31, 640, 15, 2], [1, 4, 2, 9], [0, 3, 1, -1]),
        Step([4, 2, 0], [31, 640, 15], [1, 4, 2], [0, 3, 1], 5, 25, query_len=5),
        Step([1], [40], [3], [2], query_len=3),
    ],
)
def test_inputs(step: Step, device: torch.device) -> None:
    found = random_tensors(device)
    expected = copy.deepcopy(found)
    rows, sizes = step.rows.to(device), step.sizes
    step_inputs.prepare_inputs(rows, found, **sizes)
    step_inputs.prepare_inputs_twin(rows, expected, **sizes)
    assert_equal(found, expected)
    # The twin is short, but not beyond doubt: the last token of the last request, what is sampled behind it, and the padding.
    total, end, slot = sizes["num_tokens"], step.starts[-1] + step.counts[-1], step.slots[-1]
    assert found.positions[total - 1] == end - 1
    assert found.input_ids[total - 1] == found.token_ids[slot, end - 1]
    assert found.slot_mapping[total - 1] == int(found.block_table[slot, (end - 1) // 16]) * 16 + (end - 1) % 16
    if step.drafts[-1] >= 0:
        last = sum(drafts + 1 for drafts in step.drafts) - 1
        samples = slice(last - step.drafts[-1], last + 1)
        assert found.sample_positions[samples].tolist() == list(range(end - step.drafts[-1], end + 1))
        assert found.logit_rows[samples].tolist() == list(range(total - 1 - step.drafts[-1], total))
        assert found.sample_slots[samples].tolist() == [slot] * (step.drafts[-1] + 1)
    assert (found.slot_mapping[total : step.filled_tokens] == -1).all()
    assert (found.seq_lens[len(step.slots) : step.filled_requests] == 0).all()
    if step.query_len:
        written = found.slot_mapping[:total].view(-1, step.query_len) >= 0
        assert written.sum(dim=1).tolist() == step.counts
        assert found.query_start[: len(step.slots) + 1].tolist() == [
            step.query_len * request for request in range(len(step.slots) + 1)
        ]


def test_runs(device: torch.device) -> None:
    target = random_tensors(device).token_ids
    expected = target.clone()
    data = torch.arange(2000, 3000, dtype=torch.int32, device=device)
    runs = torch.tensor([[5, 1, 0, 600], [0, 700, 604, 1], [2, 0, 608, 3]], dtype=torch.int32, device=device)
    step_inputs.write_runs(target, runs, data, 600)
    step_inputs.write_runs_twin(expected, runs, data, 600)
    assert torch.equal(target, expected)
    assert target[0, 700] == 2604


@pytest.mark.parametrize("count", [1, 5])
def test_sampled_tokens(count: int, device: torch.device) -> None:
    tensors = random_tensors(device)
    tensors.sample_slots[:5] = torch.tensor([2, 0, 5, 1, 4])
    tensors.sample_positions[:5] = torch.tensor([700, 0, 3, 44, 9])
    expected = copy.deepcopy(tensors)
    token_ids = torch.tensor([7, 0, 131_071, 5, 6], device=device)[:count]
    failed = torch.tensor([False, True, False, False, True], device=device)[:count]
    step_inputs.append_tokens(tensors, token_ids, failed)
    step_inputs.append_tokens_twin(expected, token_ids, failed)
    assert_equal(tensors, expected)
    assert tensors.sampled[:count].tolist() == [7, -1, 131_071, 5, -1][:count]
    assert tensors.token_ids[2, 700] == 7
