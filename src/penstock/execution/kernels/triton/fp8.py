"""Linear layers in 8-bit floats (e4m3) on GPUs that have units for them (compute capability 8.9): torch._scaled_mm over packed weights.

For up to 16 tokens the time is that of reading the weight, which is the same whether activations are rounded or not; so they are not,
and the weight-only kernels compute. Above, activations are quantised, each token with a scale of its own or all with the fixed one of the
checkpoint, and the units multiply 8-bit floats at twice the rate of 16-bit ones, accumulating in float32 (no fast accumulation).

The packed order of a row's features (linear_pack.py) is a permutation within spans of 128, so the very bytes that the weight-only kernels
read are a matrix for _scaled_mm as well, as long as activations are written in the same order, which costs nothing.

Blocks of 128 x 128 scales do not come here: they run on the weight-only kernels at any number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.linear import TritonLinear
from penstock.execution.kernels.triton.linear_pack import ALIGNMENT, GPUWeight

LARGEST = 448.0  # of e4m3
# Up to this many tokens activations stay as they are.
MAX_WEIGHT_ONLY_TOKENS = 16
_SMALLEST_SCALE = 1e-12
# Both sides of a matrix that _scaled_mm multiplies by are multiples of this.
_MULTIPLE = 16


class Float8Linear:
    """y = x @ weight.T + bias for 8-bit floats with one scale per output feature.

    activation_scale: fixed, from the checkpoint; None: max |x| / 448 of each token. Belongs to one stream at a time.
    """

    def __init__(self, weight: GPUWeight, bias: Tensor | None, activation_scale: float | None = None) -> None:
        self.weight_only = TritonLinear(weight, bias)
        self.nbytes = self.weight_only.nbytes
        self.bias = bias
        self.activation_scale = activation_scale
        self._columns = weight.words.view(torch.float8_e4m3fn).t()
        self._scales = weight.scales.view(1, -1)
        self._one = torch.ones((), dtype=torch.float32, device=weight.words.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] → [M, N] in the type of x."""
        if len(x) <= MAX_WEIGHT_ONLY_TOKENS:
            return self.weight_only(x)
        codes, scales = quantize_tokens(x, self.activation_scale)
        if x.dtype == torch.bfloat16:
            product: Tensor = torch._scaled_mm(codes, self._columns, scales, self._scales, out_dtype=torch.bfloat16)
        else:
            # Scales for each row come with bfloat16 results only.
            product = torch._scaled_mm(codes, self._columns, self._one, self._one, out_dtype=torch.float32)
            product = (product * scales * self._scales).to(x.dtype)
        return product if self.bias is None else product.add_(self.bias)

    def dequantize_rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, as for an embedding: ids int64 [T] → [T, K] in `dtype`."""
        return self.weight_only.dequantize_rows(ids, dtype)


def units_multiply(weight: GPUWeight, device: torch.device) -> bool:
    """Whether `Float8Linear` can have this weight on this device."""
    rowwise = weight.form == "float8" and not weight.grouped
    return rowwise and weight.out_features % _MULTIPLE == 0 and support.gpu(device).has_fp8


def quantize_tokens(x: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] → codes float8_e4m3fn [M, K padded to 128], in the order of packed weights, and scales float32 [M, 1].

    scale: a fixed one for all tokens; what is beyond 448 times it becomes that. One program per token reads it twice, the second time from
    the first-level cache in the packed order, and writes one byte for each feature.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    padded = triton.cdiv(columns, ALIGNMENT) * ALIGNMENT
    codes = torch.empty(tokens, padded, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(padded)
    _quantize_kernel[(tokens,)](
        x,
        codes,
        scales,
        columns,
        padded,
        x.stride(0),
        0.0 if scale is None else scale,
        FIXED=scale is not None,
        SPAN=ALIGNMENT,
        LARGEST=LARGEST,
        SMALLEST_SCALE=_SMALLEST_SCALE,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )
    return codes, scales


def quantize_tokens_twin(x: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_tokens` in torch's operators."""
    tokens, columns = x.shape
    values = torch.nn.functional.pad(x.float(), (0, -columns % ALIGNMENT))
    scales = (values.abs().amax(1, keepdim=True) / LARGEST).clamp_min(_SMALLEST_SCALE)
    if scale is not None:
        scales = torch.full_like(scales, scale)
    scaled = (values / scales).clamp(-LARGEST, LARGEST)
    ordered = scaled.view(tokens, -1, 4, ALIGNMENT // 4).transpose(2, 3).reshape(tokens, -1)
    return ordered.to(torch.float8_e4m3fn), scales


@triton.jit
def _quantize_kernel(
    x,
    codes,
    scales,
    columns,
    padded,
    x_stride,
    fixed_scale,
    FIXED: tl.constexpr,
    SPAN: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    if FIXED:
        scale = fixed_scale
    else:
        values = tl.load(x + token * x_stride + place, mask=place < columns, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(values), axis=0) / LARGEST, SMALLEST_SCALE)
    # Byte `place` of a packed span is feature place // 4 of run place % 4.
    within = place % SPAN
    feature = place - within + (within % 4) * (SPAN // 4) + within // 4
    ordered = tl.load(x + token * x_stride + feature, mask=feature < columns, other=0.0).to(tl.float32)
    scaled = tl.minimum(tl.maximum(ordered / scale, -LARGEST), LARGEST)
    tl.store(codes + token * padded + place, _rounded(scaled).to(tl.float8e4nv), mask=place < padded)
    tl.store(scales + token, scale)


@triton.jit
def _rounded(values):
    """float32 of magnitude up to 448 → the nearest numbers that e4m3 has, ties to even, so that the conversion is exact whoever does it."""
    bits = values.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    # Below 2 ** -6 there are multiples of 2 ** -9, which is what float32 has around 24,576.
    return tl.where(tl.abs(values) < 0.015625, (values + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))
