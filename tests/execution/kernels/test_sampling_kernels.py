"""The sampling kernels against their twins of torch operators, for every instruction set that this machine can run."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.kernels import native
from penstock.execution.kernels.sampling import find_logprobs, sample_tokens
from penstock.execution.sampling.logprobs import torch_token_logprobs
from penstock.execution.sampling.requests import SamplingRequests
from penstock.execution.sampling.torch_sampler import torch_tokens

EOS = (2,)


def _requests(vocab_size: int, rows: list[dict[str, Any]]) -> SamplingRequests:
    requests = SamplingRequests(vocab_size, len(rows), EOS)
    for slot, params in enumerate(rows):
        requests.add(
            slot,
            SamplingParams(**params),
            seed=17 * slot,
            sample_index=slot % 3,
            prompt=np.array([1, 3, 3, vocab_size - 1], dtype=np.int32),
            output=np.array([0, 3, 5 % vocab_size], dtype=np.int32),
        )
    return requests


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1e-6},
    {"top_p": 0.9},
    {"top_p": 0.1, "temperature": 1.7},
    {"top_p": 0.9999},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 2000, "top_p": 0.95, "min_p": 0.01},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.7, "min_p": 0.3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.7, "top_p": 0.9},
    {"logit_bias": {3: 5.0, 0: -100.0}, "temperature": 0.0},
    {"allowed_token_ids": (0, 1, 3), "logit_bias": {1: 2.0, 2: 50.0}},
    {"min_tokens": 9, "stop_token_ids": (0, 1)},
]


def _check(logits: Tensor, isa_params: list[dict[str, Any]], position: int = 7) -> None:
    """Kernels and twin choose the same tokens and fail in the same rows."""
    vocab_size, count = logits.shape[1], len(isa_params)
    slots, positions = np.arange(count), np.full(count, position)
    expected, expected_failed = torch_tokens(logits.clone(), _requests(vocab_size, isa_params), slots, positions)
    tokens, failed = sample_tokens(logits.clone(), _requests(vocab_size, isa_params).records, slots, positions)
    assert failed.tolist() == expected_failed.tolist()
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("vocab_size", [4, 127, 129, 4096, 40_003])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_tokens_are_those_of_the_twin(isa: str, vocab_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    _check(torch.randn(len(PARAMS), vocab_size, generator=generator) * spread, PARAMS)


def test_ties_stay_together(isa: str) -> None:
    for vocab_size in (1, 200, 20_000):
        generator = torch.Generator().manual_seed(vocab_size)
        few_values = torch.randint(0, 3, (len(PARAMS), max(vocab_size, 4)), generator=generator).float()
        _check(few_values, PARAMS)
        _check(torch.zeros(len(PARAMS), max(vocab_size, 4)), PARAMS)


def test_one_likely_token_among_many(isa: str) -> None:
    """Nothing that a sample of the vocabulary would see."""
    logits = torch.randn(len(PARAMS), 30_000, generator=torch.Generator().manual_seed(5)) * 0.1
    logits[:, 17_123] = 12.0
    logits[:, 29_999] = 11.0
    _check(logits, PARAMS)


def test_what_is_not_a_distribution_fails(isa: str) -> None:
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(6))
    logits[0, 4999] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, 100:] = -torch.inf
    params: list[dict[str, Any]] = [{"top_p": 0.9}] * 5 + [{"allowed_token_ids": (10**6,)}]
    _check(logits, params)
    _, failed = sample_tokens(logits, _requests(5000, params).records, np.arange(6), np.full(6, 7))
    assert failed.tolist() == [True, True, True, False, False, True]


def test_a_row_does_not_depend_on_the_others_nor_on_threads(isa: str, threads: None) -> None:
    logits = torch.randn(len(PARAMS), 20_000, generator=torch.Generator().manual_seed(7)) * 2
    requests = _requests(20_000, PARAMS)
    slots, positions = np.arange(len(PARAMS)), np.arange(len(PARAMS)) + 20
    native.set_threads(1)
    together, _ = sample_tokens(logits.clone(), requests.records, slots, positions)
    native.set_threads(2)
    shared, _ = sample_tokens(logits.clone(), requests.records, slots, positions)
    alone = [
        int(sample_tokens(logits[row : row + 1].clone(), requests.records, slots[row : row + 1], positions[row:])[0][0])
        for row in range(len(PARAMS))
    ]
    assert together.tolist() == shared.tolist() == alone


def test_rows_may_lie_apart_in_memory(isa: str) -> None:
    wide = torch.randn(3, 1000, generator=torch.Generator().manual_seed(8))
    requests = _requests(600, PARAMS[3:6])
    slots, positions = np.arange(3), np.full(3, 30)
    tokens, _ = sample_tokens(wide[:, :600], requests.records, slots, positions)
    expected, _ = sample_tokens(wide[:, :600].contiguous(), requests.records, slots, positions)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("vocab_size", [5, 128, 30_001])
def test_logprobs_are_those_of_the_twin(isa: str, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(4, vocab_size, generator=generator) * 3
    rows, tokens = np.array([3, 0, 2]), np.array([0, vocab_size - 1, vocab_size // 2])
    for num_top in (0, 1, 5):
        logprobs, ranks, top_ids, top_logprobs = find_logprobs(logits, rows, tokens, num_top)
        expected = torch_token_logprobs(logits[torch.from_numpy(rows)], tokens, num_top)
        np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-5)
        assert ranks.tolist() == expected.ranks.tolist()
        assert top_ids.tolist() == expected.top_ids.tolist()
        np.testing.assert_allclose(top_logprobs, expected.top_logprobs, atol=1e-5)
        alone = find_logprobs(logits, rows[1:2], tokens[1:2], num_top)
        assert alone[0][0] == logprobs[1]  # to the last bit
        assert alone[3].tolist() == top_logprobs[1:2].tolist()


def test_equally_likely_alternatives_come_in_the_order_of_their_ids(isa: str) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 500] = 1.0
    _, ranks, top_ids, _ = find_logprobs(logits, None, np.array([999]), 4)
    assert ranks.tolist() == [2]
    assert top_ids.tolist() == [[500, 0, 1, 2]]


def test_logprobs_of_what_is_not_a_number(isa: str) -> None:
    logits = torch.zeros(1, 300)
    logits[0, 299] = torch.nan
    logprobs, ranks, _, top_logprobs = find_logprobs(logits, None, np.array([1]), 2)
    assert np.isnan(logprobs).all()
    assert np.isnan(top_logprobs).all()
    assert ranks.tolist() == [1]
