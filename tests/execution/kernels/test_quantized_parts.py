"""Parts of quantised weights have the numbers of the whole, wherever they are cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from penstock.execution.kernels.quantized import (
    CodebookTensor,
    CompactWeight,
    Float8Tensor,
    QuantizedTensor,
    part_of,
)

ROWS, COLUMNS = 96, 192
# Borders between groups of 64, between groups of 32 and 16 only, and none.
BORDERS = (0, 16, 64, 96, 100, 128, 192)
ROW_BORDERS = (0, 1, 16, 24, 64, 96)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def codes() -> Tensor:
    return torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def weights() -> dict[str, CompactWeight]:
    float8 = random(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    return {
        "int4": QuantizedTensor(codes(), 4, 64, random(ROWS, 3)),
        "int4-offsets": QuantizedTensor(codes(), 4, 32, random(ROWS, 6), random(ROWS, 6)),
        "int4-small": QuantizedTensor(codes(), 4, 16, random(ROWS, 12)),
        "int8": QuantizedTensor(codes(), 8, COLUMNS, random(ROWS, 1)),
        "int8-offsets": QuantizedTensor(codes(), 8, COLUMNS, random(ROWS, 1), random(ROWS, 1)),
        "float8": Float8Tensor(float8, (ROWS, COLUMNS), random(1, 1), 0.5),
        "float8-rows": Float8Tensor(float8, (1, COLUMNS), random(ROWS, 1)),
        "float8-groups": Float8Tensor(float8, (1, 48), random(ROWS, 4)),
        "float8-blocks": Float8Tensor(float8, (64, 128), random(2, 2)),
        "float8-small-blocks": Float8Tensor(float8, (32, 64), random(3, 3)),
        "codebook": CodebookTensor(codes(), random(16), 64, random(ROWS, 3)),
    }


@pytest.mark.parametrize("name", weights())
def test_columns(name: str) -> None:
    weight = weights()[name]
    whole = weight.dequantize()
    for start, stop in itertools.combinations(BORDERS, 2):
        part = weight.columns(start, stop)
        if part is None:
            # Only where a border cuts a group into pieces that no kernel computes with.
            assert start == 100 or stop == 100 or "groups" in name, (start, stop)
            continue
        assert torch.equal(part.dequantize(), whole[:, start:stop]), (start, stop)
        assert part.codes.is_contiguous()
        assert part.codes.untyped_storage().nbytes() == part.codes.nbytes
        assert type(part) is type(weight)


@pytest.mark.parametrize("name", weights())
def test_rows(name: str) -> None:
    weight = weights()[name]
    whole = weight.dequantize()
    for start, stop in itertools.combinations(ROW_BORDERS, 2):
        part = weight.rows(start, stop)
        assert torch.equal(part.dequantize(), whole[start:stop]), (start, stop)
        # A part can be cut again.
        again = part.rows(0, 1) if stop - start == 1 else part.rows(1, stop - start)
        assert torch.equal(again.dequantize(), whole[start + (stop - start > 1) : stop])


def test_groups_stay_as_large_as_they_can() -> None:
    weight = weights()["int4"]
    sizes = {(0, 64): 64, (64, 192): 64, (16, 64): 48, (0, 96): 32, (96, 192): 32, (16, 96): 16, (96, 128): 32}
    for borders, size in sizes.items():
        part = weight.columns(*borders)
        assert isinstance(part, QuantizedTensor)
        assert part.group_size == size, borders
    # The scale of a whole row stays one scale, wherever the row is cut.
    part = weights()["int8"].columns(3, 100)
    assert isinstance(part, QuantizedTensor)
    assert (part.group_size, part.scales.shape) == (97, (ROWS, 1))


@pytest.mark.parametrize("name", weights())
def test_what_cannot_be_cut_becomes_floats(name: str) -> None:
    weight = weights()[name]
    whole = weight.dequantize()
    for rows, columns in (((16, 80), (0, 100)), ((0, ROWS), (0, COLUMNS)), ((3, 4), (64, 128)), ((90, 96), (36, 132))):
        part = part_of(weight, rows, columns)
        numbers = part if isinstance(part, Tensor) else part.dequantize()
        assert torch.equal(numbers, whole[rows[0] : rows[1], columns[0] : columns[1]])
    floats = isinstance(part_of(weight, (0, 8), (36, 132)), Tensor)
    assert floats is (
        name
        in ("int4", "int4-offsets", "int4-small", "float8-groups", "float8-blocks", "float8-small-blocks", "codebook")
    )


def test_scattered_groups() -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    weight = QuantizedTensor(codes(), 4, 64, random(ROWS, 3), input_order=order)
    assert weight.columns(0, 96) is None
    assert torch.equal(weight.rows(16, 40).dequantize(), weight.dequantize()[16:40])
    part = part_of(weight, (8, 24), (96, 192))
    assert isinstance(part, Tensor)
    assert torch.equal(part, weight.dequantize()[8:24, 96:192])
