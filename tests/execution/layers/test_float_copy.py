"""Quantised weights become floats some rows at a time, which changes no number."""

from __future__ import annotations

import pytest
import torch

from penstock.execution.kernels.quantized import CodebookTensor, CompactWeight, Float8Tensor, QuantizedTensor
from penstock.execution.layers import weight
from penstock.execution.layers.weight import float_copy

ROWS, COLUMNS = 50, 64


def codes(limit: int) -> torch.Tensor:
    return torch.randint(0, limit, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(limit), dtype=torch.uint8)


def scales(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.5


# Codes below 126 are positive numbers of e4m3.
FLOATS = codes(126).view(torch.float8_e4m3fn)
FORMS: dict[str, CompactWeight] = {
    "integers": QuantizedTensor(codes(16), 4, 32, scales(ROWS, 2), scales(ROWS, 2)),
    "ordered": QuantizedTensor(codes(256), 8, 16, scales(ROWS, 4), input_order=torch.arange(COLUMNS - 1, -1, -1)),
    "blocks": Float8Tensor(FLOATS, (16, 32), scales(4, 2)),
    "blocks wider than the weight": Float8Tensor(FLOATS, (128, 128), scales(1, 1)),
    "rows": Float8Tensor(FLOATS, (1, COLUMNS), scales(ROWS, 1)),
    "one scale": Float8Tensor(FLOATS, (ROWS, COLUMNS), scales(1, 1)),
    "codebook": CodebookTensor(codes(16), torch.linspace(-1, 1, 16), 64, scales(ROWS, 1)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows_at_once", [1, 7, 16, 49, 1000])
def test_pieces_are_the_whole(form: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "_CONVERTED_AT_ONCE", rows_at_once * COLUMNS)
    value = FORMS[form]
    assert torch.equal(float_copy(value, torch.float32), value.dequantize())
    assert torch.equal(float_copy(value, torch.bfloat16), value.dequantize().bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_rows(form: str) -> None:
    value = FORMS[form]
    assert torch.equal(value.rows(16, 33).dequantize(), value.dequantize()[16:33])
    assert value.rows(16, 33).shape == (17, COLUMNS)
