"""Probabilities of verification on small vocabularies: exactly by the formulas of races, and what the samplers do with many seeds."""

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.execution.sampling import sampler as sampler_module
from penstock.execution.sampling.draw import CHUNK
from penstock.execution.sampling.sampler import Sampler
from penstock.execution.speculative.coupling import (
    acceptance_of_coupling,
    acceptance_of_maximal_coupling,
    acceptance_of_one_hot,
)
from tests.execution.sampling.reference_sampler import draw_token, reference_start
from tests.execution.speculative.small_distributions import sampler_for

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FIRST_POSITION = 3
NUM_SEEDS = 300
NUM_POSITIONS = 200
# Tokens that are possible, by the size of their vocabulary: in one chunk, and in three.
TOKENS = {2: [0, 1], 6: [0, 1, 2, 3, 4, 5], 300: [0, 3, 127, 128, 200, 260, 299]}


def _distributions(count: int, vocab_size: int) -> list[FloatArray]:
    """Random ones that float32 logits express well; some tokens are impossible."""
    numbers = np.random.default_rng(vocab_size)
    result = []
    for _ in range(count):
        distribution = np.zeros(vocab_size)
        tokens = TOKENS[vocab_size]
        distribution[tokens] = numbers.multinomial(256, numbers.dirichlet(np.full(len(tokens), 0.7))) / 256
        result.append(distribution)
    return result


def _logits(distribution: FloatArray, rows: int) -> Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(distribution).astype(np.float32)).repeat(rows, 1)


def _sampler(vocab_size: int, num_seeds: int = NUM_SEEDS) -> Sampler:
    return sampler_for(SamplingParams(temperature=1.0), range(num_seeds), [0] * FIRST_POSITION, vocab_size)


def _draws(sampler: Sampler, distribution: FloatArray) -> IntArray:
    """What every seed draws at every position."""
    slots = np.repeat(np.arange(NUM_SEEDS), NUM_POSITIONS)
    positions = np.tile(np.arange(NUM_POSITIONS), NUM_SEEDS) + FIRST_POSITION
    return sampler.peek(_logits(distribution, len(slots)), slots, positions)


def _verified(sampler: Sampler, target: FloatArray, drafts: IntArray) -> list[tuple[int, bool]]:
    """First new token of each request, and whether its draft was accepted."""
    count = len(drafts)
    verified = sampler.verify(
        _logits(target, 2 * count), np.arange(count), np.full(count, FIRST_POSITION), drafts[:, None].tolist()
    )
    assert not verified.failed.any()
    return [(token_ids[0], len(token_ids) == 2) for token_ids in verified.token_ids]


def _is_share(found: IntArray | npt.NDArray[np.bool_], probability: float) -> None:
    """The mean of `found` is a probability, within four and a half standard deviations."""
    deviation = math.sqrt(probability * (1 - probability) / len(found))
    assert float(np.mean(found)) == pytest.approx(probability, abs=4.5 * deviation + 1e-6)


@pytest.fixture(params=["native", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(sampler_module, "native_available", lambda: False)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("vocab_size", [2, 6, 300])
def test_every_seed_draws_what_the_reference_draws(vocab_size: int) -> None:
    sampler = _sampler(vocab_size)
    for distribution in _distributions(3, vocab_size):
        slots = np.arange(NUM_SEEDS)
        found = sampler.peek(_logits(distribution, NUM_SEEDS), slots, slots + FIRST_POSITION)
        logits, kept = _logits(distribution, 1)[0].tolist(), np.flatnonzero(distribution).tolist()
        for seed in range(NUM_SEEDS):
            expected, lead = draw_token(logits, kept, 1.0, reference_start(seed, 0, seed + FIRST_POSITION))
            assert int(found[seed]) == expected or lead < 1e-6


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("vocab_size", [2, 6, 300])
def test_verification_gives_the_models_own_draw_whatever_is_drafted(vocab_size: int) -> None:
    target, draft = _distributions(2, vocab_size)
    sampler = _sampler(vocab_size)
    slots, positions = np.arange(NUM_SEEDS), np.full(NUM_SEEDS, FIRST_POSITION)
    drawn = sampler.peek(_logits(target, NUM_SEEDS), slots, positions)
    coupled = sampler.peek(_logits(draft, NUM_SEEDS), slots, positions)
    for drafts in (coupled, *(np.full(NUM_SEEDS, token) for token in TOKENS[vocab_size])):
        wanted = list(zip(drawn.tolist(), (drawn == drafts).tolist(), strict=True))
        assert _verified(sampler, target, drafts) == wanted


@pytest.mark.parametrize("vocab_size", [2, 6, 300])
def test_a_fixed_draft_is_accepted_with_its_probability_and_changes_no_law(vocab_size: int) -> None:
    (target,) = _distributions(1, vocab_size)
    drawn = _draws(_sampler(vocab_size), target)
    assert (target[drawn] > 0).all()
    for draft in TOKENS[vocab_size]:
        accepted = drawn == draft
        _is_share(accepted, acceptance_of_one_hot(target, draft))
        for token in TOKENS[vocab_size]:
            if token != draft and target[draft] < 1:
                # The law of what comes instead: the target's, without the draft, renormalised.
                _is_share(drawn[~accepted] == token, target[token] / (1 - target[draft]))


@pytest.mark.parametrize("vocab_size", [2, 6, 300])
def test_a_coupled_draft_is_accepted_as_the_formula_says(vocab_size: int) -> None:
    sampler = _sampler(vocab_size)
    for target, draft in pairwise(_distributions(3, vocab_size)):
        accepted = _draws(sampler, target) == _draws(sampler, draft)
        _is_share(accepted, acceptance_of_coupling(target, draft))


@pytest.mark.parametrize("vocab_size", [2, 6, 300])
def test_the_formula_is_the_integral_over_all_random_numbers(vocab_size: int) -> None:
    tokens = np.array(TOKENS[vocab_size])
    chunk_of = tokens // CHUNK
    num_chunks = int(chunk_of[-1]) + 1
    # Points that fill the unit cube evenly.
    engine = torch.quasirandom.SobolEngine(num_chunks + len(tokens), scramble=True, seed=1)  # type: ignore[no-untyped-call]
    points: Tensor = engine.draw(2**16, dtype=torch.float64)
    times = -np.log(points.clamp(2.0**-53, 1 - 2.0**-53).numpy())
    for target, draft in pairwise(_distributions(6, vocab_size)):
        winners = []
        for distribution in (target, draft):
            weights = distribution[tokens]
            with np.errstate(divide="ignore"):
                chunks = (times[:, :num_chunks] / np.bincount(chunk_of, weights, num_chunks)).argmin(axis=1)
                arrivals = times[:, num_chunks:] / weights
            winners.append(np.where(chunk_of == chunks[:, None], arrivals, math.inf).argmin(axis=1))
            for place, weight in enumerate(weights):
                assert float(np.mean(winners[-1] == place)) == pytest.approx(weight, abs=0.002)
        share = float(np.mean(winners[0] == winners[1]))
        assert share == pytest.approx(acceptance_of_coupling(target, draft), abs=0.002)


def test_a_race_is_near_the_maximal_coupling() -> None:
    for target, draft in pairwise(_distributions(20, 6)):
        best = acceptance_of_maximal_coupling(target, draft)
        distance = 1 - best
        # The bound of Daliri et al. 2024 for one stage; six tokens are one chunk.
        assert 1 - 2 * distance / (1 + distance) - 1e-12 <= acceptance_of_coupling(target, draft) <= best + 1e-12
    for target, draft in pairwise(_distributions(20, 300)):
        assert acceptance_of_coupling(target, draft) <= acceptance_of_maximal_coupling(target, draft) + 1e-12
        assert acceptance_of_coupling(target, target) == pytest.approx(1.0)


def test_small_cases() -> None:
    assert acceptance_of_maximal_coupling([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == 0.75
    # 1 / (1 + 2 + 1) for the first token, 1 / (1 + 1 + 1 / 2) for the second.
    assert acceptance_of_coupling([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == pytest.approx(0.25 + 0.4)
    assert acceptance_of_coupling([1.0, 0.0], [0.0, 1.0]) == 0.0
    for target in _distributions(3, 300):
        for token in TOKENS[300]:
            one_hot = np.zeros(300)
            one_hot[token] = 1.0
            expected = pytest.approx(acceptance_of_one_hot(target, token))
            assert acceptance_of_maximal_coupling(target, one_hot) == expected
            assert acceptance_of_coupling(target, one_hot) == expected


def test_a_draft_near_the_model_is_accepted_over_a_large_vocabulary() -> None:
    numbers = np.random.default_rng(3)
    logits = numbers.normal(size=32_000) * 3
    weights = np.exp([logits, logits + numbers.normal(size=32_000) * 0.15])
    target, draft = weights / weights.sum(axis=1, keepdims=True)
    best = acceptance_of_maximal_coupling(target, draft)
    assert best - 0.04 < acceptance_of_coupling(target, draft) < best < 0.95


@pytest.mark.parametrize("wrong", [[0.5, 0.4], [1.5, -0.5], [[1.0]], [math.nan, 1.0]])
def test_what_is_no_distribution_is_refused(wrong: list[float]) -> None:
    with pytest.raises(IntegrityError, match="sum to 1"):
        acceptance_of_one_hot(wrong, 0)
    with pytest.raises(IntegrityError):
        acceptance_of_coupling([1.0, 0.0], wrong)


def test_distributions_of_different_sizes_are_refused() -> None:
    with pytest.raises(IntegrityError, match="vocabularies"):
        acceptance_of_maximal_coupling([1.0], [0.5, 0.5])
