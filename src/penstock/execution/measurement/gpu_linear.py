"""Cases of the GPU benchmark: linear layers over packed weights, beside cuBLAS in 16 bits and torch's own quantised products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.kernels.quantized import CodebookTensor, Float8Tensor, QuantizedTensor
from penstock.execution.kernels.torch_int4 import TorchInt4Linear, torch_int4_supports
from penstock.execution.kernels.triton.fp8 import MAX_WEIGHT_ONLY_TOKENS, Float8Linear, units_multiply
from penstock.execution.kernels.triton.linear import TritonLinear, linear_twin
from penstock.execution.kernels.triton.linear_pack import GPUWeight, pack
from penstock.execution.measurement.gpu_timing import (
    GPUCase,
    IndexedRun,
    arithmetic_of,
    copies_for,
    relative_error,
    tolerance_of,
)

Layer = TritonLinear | Float8Linear
StoredWeight = QuantizedTensor | Float8Tensor | CodebookTensor
FLOAT = "bf16"
# Activations in e4m3 have three bits behind the point.
FLOAT8_ACTIVATIONS_ERROR = 4e-2
_FLOAT8_LIMIT = 448.0


def linear_cases(
    layer: str, size: tuple[int, int], kind: str, tokens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[GPUCase]:
    """A layer of `size` (output, input features) with weights of `kind` for every number of tokens.

    kind: 'bf16' (cuBLAS alone), 'int8', 'int4 gN', 'int4 gN zeros', 'nf4 gN', 'fp8' (a scale for each row) or 'fp8 blocks'.
    """
    shape = f"{layer} {size[0]}x{size[1]}"
    plain = _rotating_floats(size, dtype, device)
    stored = None if kind == FLOAT else random_weight(size, kind, device)
    weight = None if stored is None else pack(stored, device)
    own = [] if weight is None else _rotating_layers(weight)
    others = {} if stored is None else _torch_quantized(stored, kind, dtype, device)
    for rows in tokens:
        x = torch.randn(rows, size[1], device=device).to(dtype)
        if weight is None:
            nbytes = float(plain[0].nbytes)
            yield _case(f"linear {kind} (cuBLAS)", shape, x, size, nbytes, len(plain), _product(x, plain))
            continue
        copies = max(len(own), len(plain))
        case = _case(f"linear {kind}", shape, x, size, float(weight.nbytes), copies, _layers(x, own))
        references = {"cuBLAS 16 bit": _product(x, plain)} | {name: of(x) for name, of in others.items()}
        in_float8 = _rounds_activations(own[0], rows)
        yield dataclasses.replace(
            case,
            references=references,
            arithmetic="float8" if in_float8 else case.arithmetic,
            error=_error(x, own[0], weight),
            tolerance=FLOAT8_ACTIVATIONS_ERROR if in_float8 else case.tolerance,
        )


def _case(
    kernel: str, shape: str, x: Tensor, size: tuple[int, int], weight_bytes: float, copies: int, run: IndexedRun
) -> GPUCase:
    rows = x.shape[0]
    return GPUCase(
        kernel=kernel,
        shape=shape,
        rows=rows,
        bytes_moved=weight_bytes + float(rows * sum(size) * x.element_size()),
        operations=2.0 * rows * size[0] * size[1],
        arithmetic=arithmetic_of(x.dtype),
        copies=copies,
        run=run,
        tolerance=tolerance_of(x.dtype),
    )


def _rounds_activations(layer: Layer, rows: int) -> bool:
    return isinstance(layer, Float8Linear) and rows > MAX_WEIGHT_ONLY_TOKENS


def random_weight(size: tuple[int, int], kind: str, device: torch.device) -> StoredWeight:
    """A weight of random codes, about as large as a model's."""
    rows, columns = size
    form, _, options = kind.partition(" ")
    group = min(columns, int(options.split()[0].removeprefix("g"))) if options.startswith("g") else columns
    scales = torch.rand(rows, columns // group, device=device).add_(0.5).mul_(columns**-0.5)
    if form == "fp8":
        block = (128, 128) if options == "blocks" else (1, columns)
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        numbers = torch.randn(rows, columns, device=device).mul_(64).clamp_(-_FLOAT8_LIMIT, _FLOAT8_LIMIT)
        scales = torch.rand(grid, device=device).add_(0.5).mul_(columns**-0.5 / 64)
        return Float8Tensor(numbers.to(torch.float8_e4m3fn), block, scales)
    bits = 8 if form == "int8" else 4
    codes = torch.randint(0, 1 << bits, size, dtype=torch.uint8, device=device)
    if form == "nf4":
        return CodebookTensor(codes, torch.linspace(-1, 1, 16, device=device), group, scales)
    scales /= 1 << (bits - 2)
    offsets = scales * torch.randint(0, 1 << bits, scales.shape, device=device) if "zeros" in options else None
    return QuantizedTensor(codes, bits, group, scales, offsets)


def _rotating_floats(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    copies = copies_for(size[0] * size[1] * dtype.itemsize)
    return [torch.randn(size, device=device).mul_(size[1] ** -0.5).to(dtype) for _ in range(copies)]


def _rotating_layers(weight: GPUWeight) -> list[Layer]:
    """Layers as the engine makes them: 8-bit floats multiply in their own units where the card has them."""
    own_units = units_multiply(weight, weight.words.device)
    copies = [weight]
    for _ in range(copies_for(weight.nbytes) - 1):
        offsets = None if weight.offsets is None else weight.offsets.clone()
        words, scales = weight.words.clone(), weight.scales.clone()
        copies.append(dataclasses.replace(weight, words=words, scales=scales, offsets=offsets))
    return [Float8Linear(copy, None) if own_units else TritonLinear(copy, None) for copy in copies]


def _layers(x: Tensor, layers: Sequence[Layer]) -> IndexedRun:
    return lambda copy: layers[copy % len(layers)](x)


def _product(x: Tensor, weights: Sequence[Tensor]) -> IndexedRun:
    return lambda copy: F.linear(x, weights[copy % len(weights)])


def _error(x: Tensor, layer: Layer, weight: GPUWeight) -> Callable[[], float]:
    return lambda: relative_error(layer(x), linear_twin(x, weight, None))


def _torch_quantized(
    stored: StoredWeight, kind: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[Tensor], IndexedRun]]:
    """torch's products for such a weight, given what they multiply; they fail when called where the build or the card has none."""
    if dtype != torch.bfloat16 or device.type != "cuda":
        return {}
    if isinstance(stored, QuantizedTensor) and torch_int4_supports(stored, device, dtype):
        count = copies_for(stored.codes.numel() / 2)
        layers = [TorchInt4Linear(stored, None, device, dtype) for _ in range(count)]
        return {"torch int4 (tinygemm)": lambda x: lambda copy: layers[copy % count](x)}
    if kind == "int8":
        return {"torch int8": lambda x: _int8(x, stored.shape, device)}
    if kind == "fp8":
        return {"torch fp8 x fp8": lambda x: _float8(x, stored.shape, device)}
    return {}


def _int8(x: Tensor, size: tuple[int, int], device: torch.device) -> IndexedRun:
    count = copies_for(size[0] * size[1])
    codes = torch.randint(-127, 128, (count, *size), dtype=torch.int8, device=device)
    scales = torch.rand(count, size[0], device=device).to(x.dtype)
    return lambda copy: torch.ops.aten._weight_int8pack_mm(x, codes[copy % count], scales[copy % count])


def _float8(x: Tensor, size: tuple[int, int], device: torch.device) -> IndexedRun:
    """Activations are rounded on the way, a scale for each token, as a layer would have to."""
    count = copies_for(size[0] * size[1])
    weights = [torch.randn(size, device=device).to(torch.float8_e4m3fn) for _ in range(count)]
    weight_scales = torch.rand(1, size[0], device=device)

    def run(copy: int) -> Tensor:
        scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-6) / _FLOAT8_LIMIT
        rounded = (x / scales).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            rounded, weights[copy % count].t(), scale_a=scales, scale_b=weight_scales, out_dtype=x.dtype
        )

    return run
