"""GPTQ against a direct solution of what it approximates nothing of: the best answer of the columns that are still to come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.quantization.awq_search import round_to_codes, round_weight, search_scales
from penstock.execution.quantization.gptq_solver import inverse_factor, solve_gptq

FLOAT32 = torch.float32


def correlated_moment(columns: int, seed: int = 0) -> Tensor:
    """The second moment of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.7 * torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    moment: Tensor = inputs.T @ inputs / len(inputs)
    return moment


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    error = rounded - weight
    return float(((error @ moment) * error).sum())


def solve_directly(weight: Tensor, moment: Tensor, damping: float, group_size: int) -> Tensor:
    """Codes, with every column's turn solved from the original weight: given the errors E of the columns that are done, the quadratic loss
    is least for rest - E H[done, rest] H[rest, rest]⁻¹."""
    columns = weight.shape[1]
    damped = (moment + torch.eye(columns) * moment.diagonal().mean() * damping).double()
    original = weight.double()
    errors = torch.zeros_like(original)
    codes = torch.empty(weight.shape)
    for k in range(columns):
        current = original[:, k:].clone()
        if k:
            current -= torch.linalg.solve(damped[k:, k:], damped[k:, :k] @ errors[:, :k].T).T
        if k % group_size == 0:
            variances = torch.stack([1 / damped[j:, j:].inverse()[0, 0] for j in range(k, k + group_size)]).float()
            group = current[:, :group_size].float().unsqueeze(1)
            scales = search_scales(group, 4, FLOAT32, lambda e, v=variances: (e.square() * v).sum(-1))[:, 0]  # type: ignore[misc]
        codes[:, k] = round_to_codes(current[:, :1].float(), scales, 4)[:, 0]
        errors[:, k] = (codes[:, k] - 8) * scales - original[:, k]
    return codes.to(torch.uint8)


def test_equals_the_direct_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, moment = torch.randn(12, 160, generator=generator), correlated_moment(160)
    result = solve_gptq(weight, moment, bits=4, group_size=32, scale_dtype=FLOAT32)
    assert torch.equal(result.codes, solve_directly(weight, moment, 0.01, 32))


def test_errors_of_the_output_are_smaller_than_with_rounding() -> None:
    weight, moment = torch.randn(64, 192, generator=torch.Generator().manual_seed(2)), correlated_moment(192)
    rounded = output_error(weight, round_weight(weight, 4, 32, FLOAT32).dequantize(), moment)
    for activation_order in (False, True):
        result = solve_gptq(
            weight, moment, bits=4, group_size=32, scale_dtype=FLOAT32, activation_order=activation_order
        )
        assert output_error(weight, result.dequantize(), moment) < 0.7 * rounded
        assert result.input_order is None


def test_without_correlation_it_is_rounding_to_the_nearest() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    for moment in (torch.eye(64), torch.zeros(64, 64)):
        result = solve_gptq(weight, moment, bits=4, group_size=64, scale_dtype=FLOAT32)
        expected = round_weight(weight, 4, 64, FLOAT32)
        assert torch.equal(result.codes, expected.codes)
        torch.testing.assert_close(result.scales, expected.scales)


def test_inputs_that_never_occurred_are_rounded_to_the_nearest() -> None:
    weight, moment = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)), correlated_moment(64)
    moment[32:, :] = 0
    moment[:, 32:] = 0
    result = solve_gptq(weight, moment, bits=4, group_size=32, scale_dtype=FLOAT32)
    expected = round_weight(weight, 4, 32, FLOAT32)
    assert torch.equal(result.codes[:, 32:], expected.codes[:, 32:])


def test_inverse_factor() -> None:
    moment = correlated_moment(48)
    factor = inverse_factor(moment, 0.01)
    damped = moment + torch.eye(48) * moment.diagonal().mean() * 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, damped.inverse(), rtol=1e-3, atol=1e-4)


def test_a_singular_moment_is_damped_more_until_it_works() -> None:
    direction = torch.ones(64) * 1000
    singular = torch.outer(direction, direction)
    barely_damped = singular + torch.eye(64) * 1e6 * 1e-8
    assert torch.linalg.cholesky_ex(barely_damped).info > 0
    factor = inverse_factor(singular, 1e-8)
    assert torch.isfinite(factor).all()


def test_moments_that_cannot_be_used() -> None:
    moment = torch.eye(32)
    moment[0, 0] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        inverse_factor(moment, 0.01)
    with pytest.raises(IntegrityError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 100.0], [100.0, 1.0]]), 0.01)
