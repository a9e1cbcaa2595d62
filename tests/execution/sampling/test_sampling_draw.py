import pytest
import torch
from torch import Tensor

from penstock.execution.sampling.draw import CHUNK, FIRST_TOKEN, draw, row_maxima
from penstock.execution.sampling.random import position_starts, stream_keys
from tests.execution.sampling.reference_sampler import race, reference_start


def _starts(seeds: list[int], position: int) -> Tensor:
    keys = stream_keys(torch.tensor(seeds), torch.zeros(len(seeds), dtype=torch.int64))
    return position_starts(keys, torch.full((len(seeds),), position))


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 1000])
def test_maxima_are_the_first_on_ties(vocab_size: int) -> None:
    values = torch.randint(-3, 4, (50, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    maxima, positions = row_maxima(values)
    expected = values.amax(dim=1)
    assert torch.equal(maxima.squeeze(1), expected)
    assert positions.tolist() == [row.index(top) for row, top in zip(values.tolist(), expected.tolist(), strict=True)]


def test_maximum_of_a_row_with_nan_is_nan() -> None:
    values = torch.zeros(2, 300)
    values[1, 200] = torch.nan
    maxima, _ = row_maxima(values)
    assert maxima.isnan().squeeze(1).tolist() == [False, True]


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 500, 20_000])
def test_the_first_to_come_in_is_drawn(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 100 if vocab_size < 1000 else 2
    kept = torch.rand(rows, vocab_size, generator=generator) < 0.3
    weights = torch.rand(rows, vocab_size, generator=generator) ** 4 * kept
    weights[:, vocab_size // 2] = 0.5
    seeds = list(range(rows))
    starts = [reference_start(seed, 0, 9) for seed in seeds]
    expected = []
    for row, start in zip(weights.tolist(), starts, strict=True):
        chunks = {chunk: sum(row[chunk * CHUNK : (chunk + 1) * CHUNK]) for chunk in range(-(-vocab_size // CHUNK))}
        first = CHUNK * race(chunks, start, 0)[0]
        inside = dict(enumerate(row[first : first + CHUNK], start=first))
        expected.append(race(inside, start, FIRST_TOKEN)[0])
    assert draw(weights, _starts(seeds, 9)).tolist() == expected


def test_never_draws_a_token_without_weight() -> None:
    weights = torch.zeros(300, 400)
    weights[:100, 5] = 1e-30
    weights[100:200, 200], weights[100:200, 201] = 0.1, 0.3
    weights[200:, 399] = 7.0
    tokens = draw(weights, _starts(list(range(300)), 0)).tolist()
    assert set(tokens[:100]) == {5}
    assert set(tokens[100:200]) == {200, 201}
    assert set(tokens[200:]) == {399}


def test_scaled_weights_draw_the_same() -> None:
    weights = torch.rand(200, 300, generator=torch.Generator().manual_seed(2))
    starts = _starts(list(range(200)), 3)
    assert torch.equal(draw(weights, starts), draw(weights * 2.0**-20, starts))
