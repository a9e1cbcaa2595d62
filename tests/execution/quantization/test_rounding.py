"""Rounding while loading: scales that fit, errors near the best possible, and nothing that cannot be rounded goes unnoticed."""

from __future__ import annotations

import pytest
import torch

from penstock.execution.quantization.rounding import RoundedWeight, RoundingScheme, round_weight


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_int8_is_symmetric_with_a_scale_per_row() -> None:
    weight = weights()
    rounded = round_weight(weight, RoundingScheme(8))
    assert (rounded.bits, rounded.group_size, rounded.offsets, rounded.input_order) == (8, 256, None, None)
    torch.testing.assert_close(rounded.scales, weight.abs().amax(dim=1, keepdim=True) / 127)
    assert (rounded.dequantize() - weight).abs().max() <= rounded.scales.max() * 0.5001
    assert (rounded.codes.to(torch.int16) - 128).abs().max() == 127


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_better_than_scaling_by_the_largest(group_size: int) -> None:
    weight = weights()
    rounded = round_weight(weight, RoundingScheme(4, group_size))
    assert (rounded.bits, rounded.group_size, rounded.offsets) == (4, group_size, None)
    assert rounded.codes.max() <= 15
    assert torch.equal(rounded.scales, rounded.scales.half().float())
    groups = weight.view(48, -1, group_size)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    plain = (groups / scale).round() * scale
    error = ((rounded.dequantize() - weight) ** 2).view(48, -1, group_size).sum(-1)
    plain_error = ((plain - groups) ** 2).sum(-1)
    assert error.sum() < 0.9 * plain_error.sum()
    assert (error <= plain_error * 1.01).all()


def test_int4_finds_what_is_exact() -> None:
    codes = torch.randint(0, 16, (16, 128), generator=torch.Generator().manual_seed(1))
    codes[:, ::32] = 0
    weight = (codes - 8) * 0.25
    rounded = round_weight(weight, RoundingScheme(4, 32))
    assert torch.equal(rounded.dequantize(), weight)


@pytest.mark.parametrize("scheme", [RoundingScheme(8), RoundingScheme(4, 32)])
def test_rows_can_come_in_pieces_and_in_any_type(scheme: RoundingScheme) -> None:
    weight = weights().to(torch.bfloat16)
    whole = round_weight(weight, scheme)
    pieces = RoundedWeight(48, 256, scheme)
    for start, stop in ((40, 48), (0, 7), (7, 40)):
        pieces.put(start, weight[start:stop])
    assert torch.equal(pieces.tensor().codes, whole.codes)
    assert torch.equal(pieces.tensor().scales, whole.scales)


@pytest.mark.parametrize("scheme", [RoundingScheme(8), RoundingScheme(4, 32)])
def test_zeros_and_tiny_numbers(scheme: RoundingScheme) -> None:
    weight = weights()
    weight[3] = 0
    weight[4] = 1e-42
    rounded = round_weight(weight, scheme).dequantize()
    assert (rounded[3] == 0).all()
    assert rounded[4].abs().max() < 1e-40
    assert torch.isfinite(rounded).all()


@pytest.mark.parametrize("scheme", [RoundingScheme(8), RoundingScheme(4, 32)])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_cannot_be_rounded(scheme: RoundingScheme, value: float) -> None:
    weight = weights()
    weight[5, 7] = value
    with pytest.raises(ValueError, match="infinity or NaN"):
        round_weight(weight, scheme)


@pytest.mark.parametrize(
    ("columns", "asked", "bits", "group_size"),
    [(256, 128, 4, 128), (896, 128, 4, 128), (96, 128, 4, 32), (192, 128, 4, 64), (40, 32, 8, 40)],
)  # fmt: skip
def test_groups_divide_the_input(columns: int, asked: int, bits: int, group_size: int) -> None:
    rounded = round_weight(weights(4, columns), RoundingScheme(4, asked))
    assert (rounded.bits, rounded.group_size) == (bits, group_size)
