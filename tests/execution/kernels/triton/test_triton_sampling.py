"""Kernels of sampling that are of use alone, against their twins; random tokens are compared in test_device_sampler.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.execution.kernels.triton.logprobs import find_top_logprobs
from penstock.execution.kernels.triton.sampling import (
    PARAMETER_WORDS,
    SAMPLING_PARAMETERS,
    SamplingTables,
    SamplingWorkspace,
    choose_largest,
)
from penstock.execution.kernels.triton.sampling_keys import end_key
from penstock.execution.kernels.triton.token_masks import forbid_tokens, forbid_tokens_twin
from penstock.execution.sampling.logprobs import torch_token_logprobs

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def _logits(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    return values.to(dtype).to(device)


def _greedy_tables(rows: int, device: torch.device) -> SamplingTables:
    records = np.zeros(rows, dtype=SAMPLING_PARAMETERS)
    records["state_row"] = records["bias_row"] = -1
    parameters = torch.from_numpy(records.view(np.int64).reshape(rows, PARAMETER_WORDS)).to(device)
    return SamplingTables(
        parameters, torch.zeros(1, 8192, dtype=torch.int16, device=device), torch.zeros(1, 8192, device=device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 200, 6149])
def test_largest_logits(dtype: torch.dtype, vocab_size: int, device: torch.device) -> None:
    rows = 3
    # Columns of a wider tensor, as where a vocabulary is padded.
    logits = _logits(rows, vocab_size + 3, dtype, device)[:, :vocab_size]
    slots = torch.tensor([2, 0, 1], device=device)
    sampled = choose_largest(
        logits,
        slots,
        torch.zeros_like(slots),
        _greedy_tables(rows, device),
        SamplingWorkspace(rows + 1, vocab_size, device),
        edit=False,
        count=False,
    )
    largest = logits.float().cpu()
    assert sampled.token_ids.tolist() == [row.index(max(row)) for row in largest.tolist()]
    assert sampled.failed.tolist() == [0] * rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "num_top"), [(4, 4), (200, 0), (2100, 20), (6149, 3)])
def test_logprobs(dtype: torch.dtype, vocab_size: int, num_top: int, device: torch.device) -> None:
    logits = _logits(3, vocab_size, dtype, device)
    logits[1, : vocab_size // 2] = 5.0  # ties
    logit_rows, token_rows = torch.tensor([1, 2], device=device), torch.tensor([3, 0], device=device)
    token_ids = torch.tensor([vocab_size - 1, 9, 9, 0], device=device)
    found = find_top_logprobs(logits, logit_rows, token_rows, token_ids, num_top)
    logprobs, ranks, top_ids, top_logprobs = (tensor.cpu() for tensor in found)
    chosen = token_ids[token_rows].cpu().numpy()
    wanted = torch_token_logprobs(logits[logit_rows].float().cpu(), chosen, num_top)
    torch.testing.assert_close(logprobs, torch.from_numpy(wanted.logprobs), rtol=0, atol=3e-6)
    assert ranks.tolist() == wanted.ranks.tolist()
    assert top_ids.shape == (2, num_top)
    torch.testing.assert_close(top_logprobs, torch.from_numpy(wanted.top_logprobs), rtol=0, atol=3e-6)
    assert top_ids[1].tolist() == wanted.top_ids[1].tolist()
    # The twin leaves open which of many equals it takes.
    order = sorted(range(vocab_size), key=logits[1].float().cpu().neg().tolist().__getitem__)
    assert top_ids[0].tolist() == order[:num_top]


def test_alternatives_that_are_forbidden_come_last(device: torch.device) -> None:
    logits = torch.full((1, 2050), -torch.inf, device=device)
    logits[0, [2049, 5]] = torch.tensor([1.0, 2.0], device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    logprobs, ranks, top_ids, top_logprobs = find_top_logprobs(logits, row, row, row + 2049, 4)
    assert ranks.tolist() == [2]
    assert top_ids.tolist() == [[5, 2049, 0, 1]]
    assert float(logprobs[0]) == float(top_logprobs[0, 1])
    assert top_logprobs[0, 2:].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 203, 4099])
def test_forbidden_tokens(dtype: torch.dtype, vocab_size: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    bits = torch.randint(256, (2, -(-vocab_size // 8)), dtype=torch.uint8, generator=generator).to(device)
    logits, rows = _logits(4, vocab_size, dtype, device), torch.tensor([3, 1], device=device)
    # What is no number stays none, whether it is allowed or not.
    logits[1, :5] = torch.nan
    expected = logits.clone()
    forbid_tokens(logits, rows, bits)
    forbid_tokens_twin(expected, rows, bits)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
    for row, number in ((3, 0), (1, 1)):
        for token in range(0, vocab_size, 37):
            allowed = int(bits[number, token // 8]) >> (token % 8) & 1
            assert (logits[row, token] == -torch.inf) != bool(allowed) or bool(logits[row, token].isnan())
    assert bool(logits[[0, 2]].isfinite().all())


def test_end_keys_order_as_probabilities_do() -> None:
    keys = [end_key(min_p) for min_p in (1.0, 0.5, 0.1, 1e-9, 0.0)]
    assert keys == sorted(set(keys))
