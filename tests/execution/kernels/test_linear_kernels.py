"""Native linear layers against their twins, for every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels import native
from penstock.execution.kernels.linear import NativeLinear, PackedWeight, pack_float, pack_quantized
from penstock.execution.kernels.linear_twin import float_linear, quantized_linear
from penstock.execution.kernels.quantized import QuantizedTensor

pytestmark = pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")

# M, N, K: single rows, ragged ends, more rows than fit into a register tile, several row blocks, several pieces of K.
SHAPES = [(1, 16, 8), (3, 40, 24), (7, 33, 130), (8, 200, 1040), (29, 96, 256), (250, 80, 64), (481, 16, 72)]
GROUPED_SHAPES = [(1, 16, 128), (5, 40, 256), (8, 200, 1152), (29, 96, 640), (241, 33, 256)]


def random_weight(bits: int, rows: int, columns: int, group_size: int, *, offsets: bool = False) -> QuantizedTensor:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    codes[0] = (1 << bits) - 1  # the largest products
    groups = columns // group_size
    scales = torch.rand(rows, groups) * 0.01 + 0.001
    zeros = torch.randint(0, 1 << bits, (rows, groups)).to(torch.float32)
    return QuantizedTensor(codes, bits, group_size, scales, scales * zeros if offsets else None)


def ordered(weight: QuantizedTensor) -> QuantizedTensor:
    order = torch.randperm(weight.shape[1])
    return QuantizedTensor(weight.codes, weight.bits, weight.group_size, weight.scales, weight.offsets, order)


def random_rows(count: int, features: int) -> Tensor:
    x = torch.randn(count, features)
    x[0, : features // 2] = -50.0  # an outlier's scale for one row
    x[-1, 0] = 0.0
    return x


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_scale_per_output_feature_is_bitwise_the_twin(isa: str, bits: int, shape: tuple[int, int, int]) -> None:
    count, rows, columns = shape
    weight, x, bias = random_weight(bits, rows, columns, columns), random_rows(count, columns), torch.randn(rows)
    layer = NativeLinear([pack_quantized(weight, bias)])
    assert torch.equal(layer(x), quantized_linear(x, weight, bias))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_groups(isa: str, bits: int, group_size: int, offsets: bool) -> None:
    for count, rows, columns in GROUPED_SHAPES:
        weight = ordered(random_weight(bits, rows, columns, group_size, offsets=offsets))
        x = random_rows(count, columns)
        expected = quantized_linear(x, weight, None)
        result = NativeLinear([pack_quantized(weight, None)])(x)
        # With offsets, sums are the difference of large products.
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_floats(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    count, rows, columns = shape
    weight, x, bias = torch.randn(rows, columns).to(dtype), random_rows(count, columns), torch.randn(rows)
    expected = float_linear(x, weight, bias)
    result = NativeLinear([pack_float(weight, bias)])(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()) * columns**0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_arithmetic(isa: str, shape: tuple[int, int, int]) -> None:
    count, rows, columns = shape
    weight, x = torch.randn(rows, columns).to(torch.bfloat16), random_rows(count, columns)
    result = NativeLinear([pack_float(weight, None)], bf16_arithmetic=True)(x)
    expected = float_linear(x, weight, None, bf16_arithmetic=True)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()) * columns**0.5)
    if columns > 100:  # that the rounding of activations shows at all
        assert not torch.allclose(result, float_linear(x, weight, None), rtol=1e-5, atol=1e-4)


def all_kinds(rows: int, columns: int) -> list[tuple[PackedWeight, bool]]:
    floats = torch.randn(rows, columns)
    return [
        (pack_float(floats, None), False),
        (pack_float(floats.to(torch.bfloat16), None), False),
        (pack_float(floats.to(torch.bfloat16), None), True),
        (pack_float(floats.to(torch.float16), None), False),
        (pack_quantized(random_weight(8, rows, columns, columns), None), False),
        (pack_quantized(random_weight(4, rows, columns, columns), None), False),
        (pack_quantized(ordered(random_weight(8, rows, columns, 32)), None), False),
        (pack_quantized(random_weight(4, rows, columns, 64, offsets=True), None), False),
    ]


@pytest.mark.usefixtures("threads")
def test_a_row_is_bitwise_the_same_in_any_company(isa: str) -> None:
    x = torch.randn(250, 1152)
    for weight, bf16_arithmetic in all_kinds(150, 1152):
        layer = NativeLinear([weight], bf16_arithmetic=bf16_arithmetic)
        native.set_threads(1)
        everything = layer(x)
        native.set_threads(2)
        assert torch.equal(layer(x), everything)
        for count in [*range(1, 14), 16, 17, 32, 33]:
            assert torch.equal(layer(x[:count]), everything[:count]), (weight.kind, weight.group_size, count)
        assert torch.equal(layer(x[99:100]), everything[99:100])


def test_segments_lie_side_by_side(isa: str) -> None:
    x = torch.randn(9, 128)
    weights = [
        pack_quantized(random_weight(8, 40, 128, 128), torch.randn(40)),
        pack_float(torch.randn(24, 128), None),
        pack_quantized(ordered(random_weight(4, 17, 128, 32)), None),
    ]
    together = NativeLinear(weights)(x)
    apart = [NativeLinear([weight])(x) for weight in weights]
    assert torch.equal(together, torch.cat(apart, dim=1))


def test_strided_rows(isa: str) -> None:
    x = torch.randn(6, 256)
    for weight, bf16_arithmetic in all_kinds(20, 128):
        layer = NativeLinear([weight], bf16_arithmetic=bf16_arithmetic)
        assert torch.equal(layer(x[:, 64:192]), layer(x[:, 64:192].contiguous()))
        assert torch.equal(layer(x[:, ::2]), layer(x[:, ::2].contiguous()))


@pytest.mark.parametrize("bits", [4, 8])
def test_bad_activations_are_not_hidden(isa: str, bits: int) -> None:
    for group_size in (32, 128):
        layer = NativeLinear([pack_quantized(random_weight(bits, 16, 128, group_size), None)])
        x = torch.randn(4, 128)
        x[1, 5], x[2, 70] = float("nan"), float("inf")
        result = layer(x)
        assert torch.isfinite(result[0]).all()
        assert torch.isfinite(result[3]).all()
        assert result[1].isnan().all()
        assert not torch.isfinite(result[2]).any()


def test_zeros_and_the_smallest_numbers(isa: str) -> None:
    weight = random_weight(8, 16, 32, 32)
    layer = NativeLinear([pack_quantized(weight, None)])
    x = torch.zeros(3, 32)
    x[1], x[2] = 1e-40, 1e-25
    assert torch.equal(layer(x), quantized_linear(x, weight, None))


def test_no_rows(isa: str) -> None:
    assert NativeLinear([pack_float(torch.randn(16, 16), None)])(torch.empty(0, 16)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_float_weights(isa: str, dtype: torch.dtype) -> None:
    first, second = torch.randn(37, 51).to(dtype), torch.randn(20, 51).to(dtype)
    layer = NativeLinear([pack_float(first, None), pack_float(second, None)])
    ids = torch.tensor([0, 36, 37, 56, 15, 16, 0])
    assert torch.equal(layer.dequantize_rows(ids), torch.cat([first, second])[ids].to(torch.float32))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 96])
def test_rows_of_quantised_weights(isa: str, bits: int, offsets: bool, group_size: int) -> None:
    weight = random_weight(bits, 37, 96, group_size, offsets=offsets)
    halves = weight.scales.to(torch.float16).to(torch.float32)
    weight = ordered(QuantizedTensor(weight.codes, bits, group_size, halves, halves * 3 if offsets else None))
    rows = NativeLinear([pack_quantized(weight, None)]).dequantize_rows(torch.arange(37))
    torch.testing.assert_close(rows, weight.dequantize(), rtol=0, atol=1e-3 * float(halves.max()) * 3 if offsets else 0)


def test_rows_out_of_range() -> None:
    layer = NativeLinear([pack_float(torch.randn(16, 16), None)])
    assert layer.dequantize_rows(torch.empty(0, dtype=torch.int64)).shape == (0, 16)
    for ids in ([16], [-1]):
        with pytest.raises(IndexError, match="the weight has 16"):
            layer.dequantize_rows(torch.tensor(ids))


def test_sizes() -> None:
    weight = pack_quantized(random_weight(4, 32, 256, 128), torch.zeros(32))
    assert (weight.kind, weight.out_features, weight.in_features, weight.group_size) == ("int4", 32, 256, 128)
    assert weight.nbytes == 32 * 128 + 32 * 2 * 2 + 32 * 4
    assert NativeLinear([weight, weight]).nbytes == 2 * weight.nbytes


def test_one_scale_per_output_feature_with_offsets_becomes_groups() -> None:
    weight = random_weight(8, 16, 192, 192, offsets=True)
    packed = pack_quantized(weight, None)
    assert packed.group_size == 64
    rows = NativeLinear([packed]).dequantize_rows(torch.arange(16))
    torch.testing.assert_close(rows, weight.dequantize(), rtol=1e-3, atol=2e-3)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ModelFormatError, match="float64"):
        pack_float(torch.zeros(16, 16, dtype=torch.float64), None)
    huge = QuantizedTensor(torch.zeros(16, 32, dtype=torch.uint8), 8, 16, torch.full((16, 2), 1e5))
    with pytest.raises(ModelFormatError, match="float16"):
        pack_quantized(huge, None)
    odd = random_weight(8, 16, 24, 24, offsets=True)
    with pytest.raises(ModelFormatError, match="no group size"):
        pack_quantized(odd, None)


def test_layers_refuse_what_does_not_fit() -> None:
    first, second = pack_float(torch.zeros(16, 16), None), pack_float(torch.zeros(16, 32), None)
    with pytest.raises(ValueError, match="one to 3"):
        NativeLinear([])
    with pytest.raises(ValueError, match="share"):
        NativeLinear([first, second])
    with pytest.raises(ValueError, match="expected float32"):
        NativeLinear([first])(torch.zeros(1, 17))
