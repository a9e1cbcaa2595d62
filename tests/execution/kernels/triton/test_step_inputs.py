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
        logit_rows=int64(REQUESTS),
        sample_slots=int64(REQUESTS),
        sample_positions=int64(REQUESTS),
        sampled=int64(REQUESTS),
    )


def assert_equal(found: StepTensors, expected: StepTensors) -> None:
    for field in dataclasses.fields(StepTensors):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


@pytest.mark.parametrize(
    ("slots", "starts", "counts", "sampling", "num_rows"),
    [
        ([3], [0], [1], [0], 1),
        ([3, 0], [699, 15], [1, 1], [0, 1], 5),  # decodes with padding behind them, one at the end of its context
        ([5, 1, 2], [16, 0, 300], [1, 257, 300], [0, 2], 3),  # chunks of several programs
        ([4, 2], [31, 650], [2, 50], [], 2),
    ],
)
def test_inputs(
    slots: list[int],
    starts: list[int],
    counts: list[int],
    sampling: list[int],
    num_rows: int,
    device: torch.device,
) -> None:
    rows = torch.full((4, 8), -7, dtype=torch.int32)
    num_requests = len(slots)
    rows[0, :num_requests] = torch.tensor(slots)
    rows[1, :num_requests] = torch.tensor(starts)
    rows[2, : num_requests + 1] = torch.tensor([0, *counts]).cumsum(0)
    rows[3, :num_requests] = -1
    rows[3, sampling] = torch.arange(len(sampling), dtype=torch.int32)
    found = random_tensors(device)
    expected = copy.deepcopy(found)
    sizes = {
        "num_requests": num_requests,
        "num_rows": num_rows,
        "max_count": max(counts),
        "max_seq_len": max(start + count for start, count in zip(starts, counts, strict=True)),
    }
    step_inputs.prepare_inputs(rows.to(device), found, **sizes)
    step_inputs.prepare_inputs_twin(rows.to(device), expected, **sizes)
    assert_equal(found, expected)
    # The twin is short, but not beyond doubt: the last token of the last request, and the padding.
    total, end = sum(counts), starts[-1] + counts[-1]
    assert found.positions[total - 1] == end - 1
    assert found.input_ids[total - 1] == found.token_ids[slots[-1], end - 1]
    assert found.slot_mapping[total - 1] == int(found.block_table[slots[-1], (end - 1) // 16]) * 16 + (end - 1) % 16
    if num_rows > num_requests:
        assert found.slot_mapping[num_requests:num_rows].tolist() == [-1] * (num_rows - num_requests)
        assert found.seq_lens[num_requests:num_rows].tolist() == [0] * (num_rows - num_requests)


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
    tensors.sample_slots.copy_(torch.tensor([2, 0, 5, 1, 4]))
    tensors.sample_positions.copy_(torch.tensor([700, 0, 3, 44, 9]))
    expected = copy.deepcopy(tensors)
    token_ids = torch.tensor([7, 0, 131_071, 5, 6], device=device)[:count]
    failed = torch.tensor([False, True, False, False, True], device=device)[:count]
    step_inputs.append_tokens(tensors, token_ids, failed)
    step_inputs.append_tokens_twin(expected, token_ids, failed)
    assert_equal(tensors, expected)
    assert tensors.sampled[:count].tolist() == [7, -1, 131_071, 5, -1][:count]
    assert tensors.token_ids[2, 700] == 7
