"""What the formats of quantised checkpoints have in common: integers packed into 32 bits, zero points, and groups in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.quantization.registry import WeightLayout


def unpack_columns(packed: Tensor, bits: int) -> Tensor:
    """int32 [R, C] → uint8 [R, C * 32 / bits]; of each integer the lowest bits come first. `bits` is 4 or 8."""
    rows, columns = len(packed), 4 * packed.shape[1]
    # One-dimensional first: of a matrix with one column torch takes any stride for contiguous, and then does not view it as bytes.
    packed_bytes = packed.reshape(-1).view(torch.uint8).view(rows, columns)
    if bits == 8:
        return packed_bytes
    codes = torch.empty(rows, columns, 2, dtype=torch.uint8)
    torch.bitwise_and(packed_bytes, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(packed_bytes, 4, out=codes[:, :, 1])
    return codes.view(rows, 2 * columns)


def quantized_tensor(
    codes: Tensor, layout: WeightLayout, scales: Tensor, zeros: Tensor | None, group_index: Tensor | None = None
) -> QuantizedTensor:
    """The canonical form of weight = scales * (codes - zeros).

    codes: uint8 [N, K]. scales, and zeros as unsigned codes: [N, K / group_size]; no zeros, or all in the middle: symmetric.
    group_index: integer [K], the group of each input feature; None: the first group has the first features, and so on. When groups
    are scattered, columns are sorted by group. Raises ModelFormatError when groups are not of equal size or scales are no floats.
    """
    if not scales.is_floating_point():
        raise ModelFormatError(f"scales have the type {scales.dtype}; needed are floating-point numbers.")
    scales = scales.to(torch.float32).contiguous()
    offsets = None
    if zeros is not None and bool((zeros != 1 << (layout.bits - 1)).any()):
        offsets = scales * zeros.to(torch.float32)
    input_order = None if group_index is None else _input_order(group_index, layout)
    if input_order is not None:
        codes = codes.index_select(1, input_order)
    return QuantizedTensor(codes.contiguous(), layout.bits, layout.group_size, scales, offsets, input_order)


def _input_order(group_index: Tensor, layout: WeightLayout) -> Tensor | None:
    """int64 [K]: input features sorted by group, or None when they are sorted already."""
    groups = layout.columns // layout.group_size
    group_index = group_index.to(torch.int64)
    if group_index.shape != (layout.columns,) or bool(((group_index < 0) | (group_index >= groups)).any()):
        raise ModelFormatError(f"the group index must hold {layout.columns} numbers from 0 to {groups - 1}.")
    if bool((torch.bincount(group_index, minlength=groups) != layout.group_size).any()):
        raise ModelFormatError(f"the group index must give each group {layout.group_size} input features.")
    sorted_index, order = torch.sort(group_index, stable=True)
    return None if torch.equal(sorted_index, group_index) else order
