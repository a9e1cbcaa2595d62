import pytest
import torch

from penstock.execution.sampling.draw import draw, row_maxima


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


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 500])
def test_draws_by_inverting_the_cumulative_distribution(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(200, vocab_size, generator=generator) * (
        torch.rand(200, vocab_size, generator=generator) < 0.3
    )
    weights[:, vocab_size // 2] = 0.5
    numbers = torch.rand(200, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    cumulative = weights.double().cumsum(1)
    expected = (cumulative <= numbers.unsqueeze(1) * cumulative[:, -1:]).sum(1)
    assert torch.equal(draw(weights, numbers), expected)


def test_never_draws_a_token_without_weight() -> None:
    weights = torch.zeros(3, 400)
    weights[0, 5] = 1e-30
    weights[1, 200], weights[1, 201] = 0.1, 0.3
    weights[2, 399] = 7.0
    for number in (2.0**-53, 0.5, 1 - 2.0**-53):
        tokens = draw(weights, torch.full((3,), number, dtype=torch.float64)).tolist()
        assert tokens[0] == 5
        assert tokens[1] in (200, 201)
        assert tokens[2] == 399
