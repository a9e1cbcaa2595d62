"""Kernels that read a row of activations and write one: norms, gated activation. Each program has a row (or a part of one) in registers,
so that every number is read and written once. Twins: `*_twin`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension; x [T, size], sums in float32."""
    output = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _norm_kernel[(len(x),)](
        x, x, weight, output, size, x.stride(0), eps, ADD=False, BLOCK=block, num_warps=_num_warps(block)
    )
    return output


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `x` [T, size] in place, and give the norm of the sum."""
    output = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _norm_kernel[(len(x),)](
        x, delta, weight, output, size, x.stride(0), eps, ADD=True, BLOCK=block, num_warps=_num_warps(block)
    )
    return output


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * I], the gate's half first → silu(gate) * up, [T, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, size)
    block = min(1024, triton.next_power_of_2(size))
    _silu_kernel[(rows, triton.cdiv(size, block))](gate_up, output, size, BLOCK=block, num_warps=4)
    return output


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch's operators."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def silu_and_mul_twin(gate_up: Tensor) -> Tensor:
    """`silu_and_mul` in torch's operators."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _num_warps(block: int) -> int:
    """Sixteen numbers a thread, up to sixteen warps."""
    return max(1, min(16, block // 512))


@triton.jit
def _norm_kernel(x, delta, weight, output, size, stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(delta + row * size + column, mask=inside, other=0.0).to(tl.float32)
        # The sum is what the next layer adds to, so the norm is of the rounded one.
        values = values.to(x.dtype.element_ty).to(tl.float32)
        tl.store(x + row * stride + column, values, mask=inside)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    factors = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * size + column, values * scale * factors, mask=inside)


@triton.jit
def _silu_kernel(gate_up, output, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * size + column, gate * tl.sigmoid(gate) * up, mask=inside)
