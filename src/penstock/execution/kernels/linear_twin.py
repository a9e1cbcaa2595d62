"""Linear layers in plain torch operators: what the native kernels of linear.py compute, operation by operation.

int8 and int4 weights meet activations quantised to int8, symmetric, with one scale for every row and group of input features:

    scale = largest |x| / 127        code = x * (127 / largest |x|), rounded to nearest, ties to even

Products of codes are exact integers. With one scale per output feature the result is bitwise the kernels'; sums of floats differ from
theirs in the last bits, because torch may add in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import QuantizedTensor

# Groups whose largest magnitude is smaller become zeros: the reciprocal might overflow.
_SMALLEST_MAGNITUDE = 2.0**-100


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x float32 [M, K] → codes int8 [M, K] and scales float32 [M, K / group_size]. A group with a NaN has scale NaN."""
    grouped = x.view(len(x), -1, group_size)
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    factor = torch.where(largest >= _SMALLEST_MAGNITUDE, 127.0 / largest, torch.zeros_like(largest))
    codes = torch.round(grouped * factor).nan_to_num().to(torch.int8)
    return codes.view_as(x), (largest / 127.0).squeeze(-1)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, bf16_arithmetic: bool = False) -> Tensor:
    """x float32 [M, K] times a weight [N, K] of any float type, in float32. bf16_arithmetic: x is rounded to bfloat16 first if the
    weight is bfloat16."""
    if bf16_arithmetic and weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16).to(torch.float32)
    product = x @ weight.to(torch.float32).T
    return product if bias is None else product + bias


def quantized_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x float32 [M, K] times a quantised weight [N, K], float32 [M, N]. Grouped scales and offsets count as rounded to float16."""
    rows, columns = weight.shape
    if weight.input_order is not None:
        x = x[:, weight.input_order]
    codes, row_scales = quantize_activations(x, weight.group_size)
    # float64 holds every integer that occurs here.
    zero = weight.zero_code if weight.offsets is None else 0
    left = codes.view(len(x), -1, weight.group_size).transpose(0, 1).to(torch.float64)
    right = weight.codes.view(rows, -1, weight.group_size).permute(1, 2, 0).to(torch.float64) - zero
    products = torch.bmm(left, right).to(torch.float32)  # [groups, M, N]
    if weight.group_size == columns and weight.offsets is None:
        product = products[0] * (row_scales * weight.scales.T)
    else:
        scales = weight.scales.to(torch.float16).to(torch.float32)
        product = (products * row_scales.T.unsqueeze(-1) * scales.T.unsqueeze(1)).sum(dim=0)
        if weight.offsets is not None:
            sums = left.sum(dim=-1).T.to(torch.float32)
            product = product - (row_scales * sums) @ weight.offsets.to(torch.float16).to(torch.float32).T
    return product if bias is None else product + bias
