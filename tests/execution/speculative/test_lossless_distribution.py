"""Tokens of verified generation follow the model's distribution, over thousands of seeds, and are those of plain decoding."""

import math
from collections import Counter
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch

from penstock.core.types import SamplingParams
from penstock.execution.sampling.sampler import Sampler
from tests.execution.sampling.reference_sampler import kept_tokens, process
from tests.execution.speculative.small_distributions import sampler_for

VOCAB = 5
NUM_SEEDS = 1500
NUM_DRAFTS = 2
# Consecutive tokens whose joint distribution is looked at.
WINDOW = 3
PROMPT = [1, 4]

IntArray = npt.NDArray[np.int64]

# The logits of the next token, given the last one: the model's, and those of a draft model that is near it.
_NOISE = torch.Generator().manual_seed(11)
TARGET = torch.randn(VOCAB, VOCAB, generator=_NOISE) * 1.2
DRAFT = TARGET + torch.randn(VOCAB, VOCAB, generator=_NOISE) * 0.5

PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=3),
    SamplingParams(temperature=1.2, top_p=0.8),
    SamplingParams(temperature=1.5, top_k=4, top_p=0.95, min_p=0.1),
    SamplingParams(temperature=1.0, frequency_penalty=0.6, presence_penalty=0.4, logit_bias={2: 0.8}),
]


def _joint_distribution(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of WINDOW tokens, by the reference."""
    result = {}
    for tokens in product(range(VOCAB), repeat=WINDOW):
        probability = 1.0
        for index, token in enumerate(tokens):
            output = list(tokens[:index])
            logits = process(TARGET[(PROMPT + output)[-1]].tolist(), params, PROMPT, output, ())
            kept, _ = kept_tokens(logits, params)
            weights = {other: math.exp(logits[other] / params.temperature) for other in kept}
            probability *= weights.get(token, 0.0) / sum(weights.values())
        result[tokens] = probability
    return result


def _fixed_drafts(sampler: Sampler, last: IntArray, positions: IntArray) -> IntArray:
    """What an n-gram proposer is: tokens that depend on no random number."""
    best = DRAFT.argmax(dim=1).numpy()
    first = best[last]
    return np.stack([first, best[first]], axis=1)


def _coupled_drafts(sampler: Sampler, last: IntArray, positions: IntArray) -> IntArray:
    """A draft model's own samples, drawn with the numbers that the model will draw with."""
    slots, drafts = np.arange(len(last)), []
    for offset in range(NUM_DRAFTS):
        last = sampler.peek(DRAFT[last].clone(), slots, positions + offset)
        drafts.append(last)
    return np.stack(drafts, axis=1)


def _generate(params: SamplingParams, proposer: str) -> tuple[list[tuple[int, ...]], float]:
    """The first tokens of every seed's request, and the share of drafts that were accepted."""
    sampler = sampler_for(params, range(NUM_SEEDS), PROMPT, VOCAB)
    propose = _fixed_drafts if proposer == "fixed" else _coupled_drafts
    slots = np.arange(NUM_SEEDS)
    tokens: list[list[int]] = [[] for _ in slots]
    num_accepted = num_rounds = 0
    while min(len(some) for some in tokens) < WINDOW:
        last = np.array([(PROMPT + some)[-1] for some in tokens])
        positions = np.array([len(PROMPT) + len(some) for some in tokens])
        drafts = propose(sampler, last, positions)
        rows = np.concatenate([last[:, None], drafts], axis=1).reshape(-1)
        verified = sampler.verify(TARGET[torch.from_numpy(rows)], slots, positions, drafts.tolist())
        assert not verified.failed.any()
        for known, new in zip(tokens, verified.token_ids, strict=True):
            known.extend(new)
            num_accepted += len(new) - 1
        num_rounds += 1
    return [tuple(some[:WINDOW]) for some in tokens], num_accepted / (num_rounds * NUM_SEEDS * NUM_DRAFTS)


def _plain(params: SamplingParams) -> list[tuple[int, ...]]:
    sampler = sampler_for(params, range(NUM_SEEDS), PROMPT, VOCAB)
    last = np.full(NUM_SEEDS, PROMPT[-1])
    columns = []
    for offset in range(WINDOW):
        positions = np.full(NUM_SEEDS, len(PROMPT) + offset)
        last = sampler.sample(TARGET[torch.from_numpy(last)], np.arange(NUM_SEEDS), positions).token_ids
        columns.append(last.tolist())
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("params", PARAMS, ids=["plain", "top_k", "top_p", "all_filters", "penalties"])
def test_verified_tokens_follow_the_models_joint_distribution(params: SamplingParams) -> None:
    plain = _plain(params)
    acceptances = {}
    for proposer in ("fixed", "coupled"):
        tokens, acceptances[proposer] = _generate(params, proposer)
        assert tokens == plain
    assert 0.1 < acceptances["fixed"] < acceptances["coupled"] < 0.95

    expected = {some: NUM_SEEDS * probability for some, probability in _joint_distribution(params).items()}
    counts = Counter(plain)
    assert all(expected[some] > 0 for some in counts)
    # Rare sequences are taken together, as the statistic needs a few of each kind.
    kinds = [[some] for some in expected if expected[some] > 5]
    rare = [some for some in expected if 0 < expected[some] <= 5]
    kinds += [rare] if rare else []
    statistic = 0.0
    for kind in kinds:
        wanted = sum(expected[some] for some in kind)
        statistic += (sum(counts[some] for some in kind) - wanted) ** 2 / wanted
    freedom = len(kinds) - 1
    assert freedom > 12
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom)
