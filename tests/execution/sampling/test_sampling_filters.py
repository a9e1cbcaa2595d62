import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.sampling.filters import PREFILTER, scale_logits, thresholds
from tests.execution.sampling.reference_sampler import kept_tokens


def _kept(logits: Tensor, rows: list[SamplingParams]) -> list[list[int]]:
    vocab_size = logits.shape[1]
    temperature = torch.tensor([params.temperature for params in rows])
    scaled = scale_logits(logits, logits.amax(dim=1, keepdim=True), temperature)
    smallest = thresholds(
        scaled,
        scaled.exp(),
        torch.tensor([params.top_k if params.top_k > 0 else vocab_size for params in rows]).clamp(max=vocab_size),
        torch.tensor([params.top_p for params in rows], dtype=torch.float64),
        torch.tensor([params.min_p for params in rows], dtype=torch.float64),
    )
    return [torch.nonzero(row).flatten().tolist() for row in scaled >= smallest.unsqueeze(1)]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Tensor, list[SamplingParams]]:
    vocab_size = draw(st.integers(1, 3 * PREFILTER))
    num_rows = draw(st.integers(1, 4))
    # Few distinct values: many ties, also across the border of the prefilter. Wide or narrow: sure or unsure of itself.
    spread = draw(st.sampled_from([0.0, 0.05, 0.5, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = draw(st.sampled_from([3, 10, 1000]))
    logits = torch.randint(-steps, steps + 1, (num_rows, vocab_size), generator=generator) / steps * spread
    rows = [
        SamplingParams(
            temperature=draw(st.sampled_from([0.1, 0.7, 1.0, 2.0])),
            top_k=draw(st.one_of(st.just(0), st.integers(1, 2 * vocab_size))),
            top_p=draw(st.one_of(st.just(1.0), st.floats(0.01, 1.0))),
            min_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
        )
        for _ in range(num_rows)
    ]
    return logits, rows


@settings(max_examples=80, deadline=None, derandomize=True)
@given(_cases())
def test_keeps_what_the_definition_keeps(case: tuple[Tensor, list[SamplingParams]]) -> None:
    logits, rows = case
    for kept, row, params in zip(_kept(logits, rows), logits.tolist(), rows, strict=True):
        expected, closest = kept_tokens(row, params)
        assume(closest > 1e-5)
        assert kept == expected


def test_ties_stay_together_and_one_token_always_stays() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 0.0, 0.0]])
    assert _kept(logits, [SamplingParams(top_k=1)] * 3) == [[1, 2], [0, 1, 2, 3], [0]]
    assert _kept(logits, [SamplingParams(top_p=1e-9)] * 3) == [[1, 2], [0, 1, 2, 3], [0]]
    assert _kept(logits, [SamplingParams(min_p=1.0)] * 3) == [[1, 2], [0, 1, 2, 3], [0]]


def test_top_p_counts_what_top_k_left() -> None:
    # Probabilities 0.4, 0.3, 0.2, 0.1; after top_k 2 they are 4/7 and 3/7.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert _kept(logits, [SamplingParams(top_p=0.5)]) == [[0, 1]]
    assert _kept(logits, [SamplingParams(top_p=0.5, top_k=2)]) == [[0]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 2.0])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    logits = torch.tensor([[300.0, -300.0, 299.0]])
    scaled = scale_logits(logits, logits.amax(dim=1, keepdim=True), torch.tensor([temperature]))
    assert float(scaled.max()) == 0
    assert not scaled.isnan().any()
