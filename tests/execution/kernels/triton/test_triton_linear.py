"""Products over packed quantised weights against x @ dequantised weight in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.quantized import CodebookTensor, CompactWeight, Float8Tensor, QuantizedTensor
from penstock.execution.kernels.torch_int4 import TorchInt4Linear, torch_int4_supports
from penstock.execution.kernels.triton import fp8, linear, linear_gemm, linear_pack, support
from penstock.execution.kernels.triton.linear import TritonLinear, linear_twin
from penstock.execution.layers.linear_choice import cuda_seconds

# Weights are rounded once to 16 bits (float32: middles are subtracted from numbers up to 66 times larger), results once more.
UNIT = {torch.float32: 2**-17, torch.float16: 2**-11, torch.bfloat16: 2**-8}
HALVES = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def integers(
    rows: int, columns: int, bits: int, group: int = 0, *, offsets: bool = False, seed: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // (group or columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1) * 0.01
    zeros = torch.rand(rows, groups, generator=generator) * (1 << bits)
    return QuantizedTensor(codes, bits, group or columns, scales, zeros * scales if offsets else None)


def codebook(rows: int, columns: int, group: int) -> CodebookTensor:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    table = torch.linspace(-1, 1, 16) ** 3
    return CodebookTensor(codes, table, group, torch.rand(rows, columns // group, generator=generator))


def float8(rows: int, columns: int, block: tuple[int, int]) -> Float8Tensor:
    generator = torch.Generator().manual_seed(2)
    codes = (torch.randn(rows, columns, generator=generator) * 60).to(torch.float8_e4m3fn)
    shape = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    return Float8Tensor(codes, block, (torch.rand(shape, generator=generator) + 0.1) * 1e-3)


WEIGHTS: dict[str, Callable[[], CompactWeight]] = {
    "int4 group 32": lambda: integers(41, 256, 4, 32),
    "int4 group 64 offsets": lambda: integers(33, 192, 4, 64, offsets=True),
    "int4 group 128": lambda: integers(64, 256, 4, 128),
    "int4 group 256": lambda: integers(24, 512, 4, 256),
    "int4 group 16": lambda: integers(9, 96, 4, 16),
    "int4 per row": lambda: integers(33, 100, 4),
    "int4 per row offsets": lambda: integers(17, 70, 4, offsets=True),
    "int8 per row": lambda: integers(33, 200, 8),
    "int8 group 128 offsets": lambda: integers(17, 256, 8, 128, offsets=True),
    "int8 group 96": lambda: integers(20, 192, 8, 96),
    "codebook group 64": lambda: codebook(40, 192, 64),
    "float8 per row": lambda: float8(33, 200, (1, 200)),
    "float8 per tensor": lambda: float8(33, 256, (33, 256)),
    "float8 blocks": lambda: float8(140, 300, (128, 128)),
}
# Every kernel and tile, and both types of activations; the other forms differ in how a word is decoded.
SHAPES = [(1, "single"), (1, "half"), (2, "half"), (3, "single"), (16, "half"), (17, "single"), (33, "half")]
FEW_SHAPES = [(1, "single"), (3, "half")]
CASES = [
    (name, tokens, kind)
    for name in WEIGHTS
    for tokens, kind in (SHAPES if name in {"int4 group 64 offsets", "int8 per row", "int4 group 32"} else FEW_SHAPES)
]


def activations(tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=generator).to(device, dtype)


def check(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of weights, of the sum and of the result, relative to what was added up."""
    weight = weight.double()
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.abs().T
    assert actual.dtype == x.dtype
    excess = (actual.double() - expected).abs() - UNIT[x.dtype] * (magnitude + expected.abs())
    assert float(excess.max()) <= 0, f"{float(excess.max())} too far"


@pytest.mark.parametrize(("name", "tokens", "kind"), CASES)
def test_product(name: str, tokens: int, kind: str, device: torch.device) -> None:
    weight = linear_pack.pack(WEIGHTS[name](), device)
    bias = torch.linspace(-1, 1, weight.out_features, device=device) if tokens % 2 else None
    layer = TritonLinear(weight, bias)
    for dtype in [torch.float32] if kind == "single" else HALVES:
        x = activations(tokens, weight.in_features, dtype, device)
        check(layer(x), x, weight.dequantize(), bias)


@pytest.mark.parametrize("name", WEIGHTS)
def test_packing_keeps_the_weight(name: str, device: torch.device) -> None:
    weight = WEIGHTS[name]()
    packed = linear_pack.pack(weight, device)
    expected = weight.dequantize().to(device)
    if packed.scales.dtype == torch.float32:
        torch.testing.assert_close(packed.dequantize(), expected, rtol=1e-6, atol=0)
    else:
        # Scales and offsets are rounded to eleven bits, and both may be as large as the largest weight.
        torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=float(expected.abs().max()) * 2**-10)
    assert packed.dequantize().shape == expected.shape


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_scales_of_sixteen_bits_lose_nothing(stored: torch.dtype) -> None:
    weight = integers(16, 256, 4, 64)
    # Far below what float16 holds by itself.
    weight = dataclasses.replace(weight, scales=(weight.scales.to(stored).float()) * 2.0**-20)
    packed = linear_pack.pack(weight, torch.device("cpu"))
    assert torch.equal(packed.dequantize(), weight.dequantize())


def test_packed_weight_takes_what_its_codes_take() -> None:
    packed = linear_pack.pack(integers(64, 1024, 4, 128), torch.device("cpu"))
    assert packed.nbytes == 64 * 1024 // 2 + 64 * 8 * 2


def test_groups_that_cannot_be_packed() -> None:
    weight = CodebookTensor(torch.zeros(4, 24, dtype=torch.uint8), torch.zeros(16), 8, torch.ones(4, 3))
    assert not linear_pack.can_pack(weight)
    with pytest.raises(IntegrityError, match="groups of 8"):
        linear_pack.pack(weight, torch.device("cpu"))


@pytest.mark.parametrize(("tokens", "dtype"), [(5, torch.float32), (40, torch.float16)])
def test_parts_of_k_are_added_in_the_same_order_every_time(
    tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    weight = linear_pack.pack(integers(70, 2048, 4, 128), device)
    assert linear_gemm.tiling(tokens, weight, dtype, support.gpu(device)).splits > 1
    layer = TritonLinear(weight, torch.ones(70, device=device))
    x = activations(tokens, 2048, dtype, device)
    first = layer(x)
    check(first, x, weight.dequantize(), layer.bias)
    # Counters are back at zero: a second call gives the same bits.
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("tokens", [1, 4])
def test_input_order(tokens: int, device: torch.device) -> None:
    weight = integers(20, 128, 4, 32)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    weight = dataclasses.replace(weight, input_order=order)
    layer = TritonLinear(linear_pack.pack(weight, device), None)
    x = activations(tokens, 128, torch.float32, device)
    torch.testing.assert_close(layer(x), F.linear(x, weight.dequantize().to(device)), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(layer(x), linear_twin(x, layer.weight, None), rtol=1e-4, atol=1e-5)


def test_many_tokens_are_multiplied_in_slices(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SLICE_BYTES", 7 * 100 * 4)
    weight = linear_pack.pack(integers(20, 100, 8), device)
    layer = TritonLinear(weight, torch.ones(20, device=device))
    x = activations(linear.MAX_GEMM_TOKENS + 1, 100, torch.float32, device)
    check(layer(x), x, weight.dequantize(), layer.bias)


def test_odd_inputs(device: torch.device) -> None:
    weight = linear_pack.pack(integers(20, 64, 8), device)
    layer = TritonLinear(weight, None)
    assert layer(torch.empty(0, 64, device=device)).shape == (0, 20)
    wide = activations(3, 130, torch.float32, device)
    for x in (wide[:, :64], wide[:, ::2][:, 1:], wide[:1, 66:]):
        check(layer(x), x, weight.dequantize(), None)
    with pytest.raises(IntegrityError, match=r"expected \[M, 64\]"):
        layer(wide)


@pytest.mark.parametrize("name", ["int4 group 64 offsets", "int8 per row", "codebook group 64", "float8 blocks"])
def test_rows(name: str, device: torch.device) -> None:
    weight = linear_pack.pack(WEIGHTS[name](), device)
    order = torch.randperm(weight.in_features, generator=torch.Generator().manual_seed(0)).to(device)
    expected = weight.dequantize()
    ids = torch.tensor([3, 0, 3, weight.out_features - 1], device=device)
    rows = TritonLinear(weight, None).dequantize_rows(ids, torch.float32)
    torch.testing.assert_close(rows, expected[ids], rtol=1e-6, atol=1e-7)
    ordered = TritonLinear(dataclasses.replace(weight, input_order=order), None)
    torch.testing.assert_close(ordered.dequantize_rows(ids, torch.float32)[:, order], rows)
    beyond = torch.tensor([-5, weight.out_features + 9], device=device)
    outer = TritonLinear(weight, None).dequantize_rows(beyond, torch.float32)
    torch.testing.assert_close(outer, expected[[0, -1]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("capability", [80, 90])
def test_all_eight_bit_floats_are_decoded_exactly(
    capability: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and capability > support.gpu(device).capability:
        pytest.skip("this GPU has no 8-bit floats")
    monkeypatch.setattr(support, "gpu", lambda _: support.GPU(capability, 4))
    # 0x7F and 0xFF are not numbers.
    codes = torch.tensor([[*range(127), *range(128, 255)]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = linear_pack.pack(Float8Tensor(codes, (1, 254), torch.ones(1, 1)), device)
    layer = TritonLinear(weight, None)
    rows = layer.dequantize_rows(torch.zeros(1, dtype=torch.int64, device=device), torch.float32)
    assert torch.equal(rows, codes.float().to(device))
    assert torch.equal(layer(torch.eye(254, device=device)[7:8]), rows[:, 7:8])
    assert torch.equal(layer(torch.eye(254, device=device)[:130]), rows[:, :130].T)


needs_units = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no 8-bit floats"
)


@needs_units
@pytest.mark.parametrize("columns", [128, 200])
@pytest.mark.parametrize("scale", [None, 0.004])
def test_quantised_tokens(columns: int, scale: float | None, device: torch.device) -> None:
    x = activations(4, columns, torch.float32, device)
    x[1] = 0
    x[2, :5] = torch.tensor([1e-4, -3.0, 1000.0, -1e-9, 0.0])
    codes, scales = fp8.quantize_tokens(x, scale)
    expected_codes, expected_scales = fp8.quantize_tokens_twin(x, scale)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    if device.type == "cuda":
        # Division may differ in the last bit, and so may then a code.
        assert float((codes.float() != expected_codes.float()).float().mean()) < 0.01
    else:
        assert torch.equal(codes.float(), expected_codes.float())


@needs_units
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_eight_bit_activations(dtype: torch.dtype, scale: float | None, device: torch.device) -> None:
    weight = linear_pack.pack(float8(32, 200, (1, 200)), device)
    assert fp8.units_multiply(weight, device)
    bias = torch.linspace(-1, 1, 32, device=device, dtype=dtype)
    layer = fp8.Float8Linear(weight, bias, scale)
    x = activations(fp8.MAX_WEIGHT_ONLY_TOKENS + 1, 200, dtype, device)
    codes, scales = fp8.quantize_tokens_twin(x, scale)
    matrix = weight.words.view(torch.float8_e4m3fn).float() * weight.scales[:, None]
    expected = (codes.float() * scales) @ matrix.T
    # The units of a GPU keep fewer bits of a sum of 8-bit products than float32 has.
    unit = 2**-7 if dtype == torch.bfloat16 else 2**-12 if device.type == "cpu" else 2**-9
    torch.testing.assert_close(
        layer(x).float(), expected + bias.float(), rtol=unit, atol=unit * float(expected.abs().max())
    )
    # The order of packed features is the same on both sides: the product is that of the plain weight, but for rounded activations.
    difference = (layer(x).float() - linear_twin(x, weight, bias)).abs().max()
    assert float(difference) < 0.06 * float(expected.abs().max())


@needs_units
def test_few_tokens_are_not_rounded(device: torch.device) -> None:
    weight = linear_pack.pack(float8(32, 256, (1, 256)), device)
    layer = fp8.Float8Linear(weight, None)
    x = activations(2, 256, torch.float32, device)
    check(layer(x), x, weight.dequantize(), None)


def test_units_need_rows_of_sixteen_and_no_blocks(device: torch.device) -> None:
    assert not fp8.units_multiply(linear_pack.pack(float8(33, 256, (1, 256)), device), device)
    assert not fp8.units_multiply(linear_pack.pack(float8(256, 256, (128, 128)), device), device)
    assert not fp8.units_multiply(linear_pack.pack(integers(32, 256, 8), device), device)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_torch_int4_computes_the_same(group: int, tokens: int, device: torch.device) -> None:
    weight = integers(64, 256, 4, group, offsets=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert torch_int4_supports(weight, device, dtype)
    bias = torch.linspace(-1, 1, 64)
    x = activations(tokens, 256, dtype, device)
    product = TorchInt4Linear(weight, bias, device, dtype)(x)
    dense = weight.dequantize().to(device)
    expected = F.linear(x.float(), dense, bias.to(device))
    magnitude = x.float().abs() @ (weight.scales.to(device).amax() * 16 + dense.abs()).T
    assert bool(((product.float() - expected).abs() <= UNIT[dtype] * (magnitude + expected.abs())).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU")
def test_times_of_kernels_are_plausible(device: torch.device) -> None:
    small, large = (linear_pack.pack(integers(rows, 2048, 4, 128), device) for rows in (1024, 65536))
    x = activations(1, 2048, torch.bfloat16, device)
    seconds = [cuda_seconds(TritonLinear(weight, None), x) for weight in (small, large)]
    assert 1e-7 < seconds[0] < seconds[1] < 1e-2
