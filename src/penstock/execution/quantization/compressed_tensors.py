"""Checkpoints in the formats of compressed-tensors (https://github.com/vllm-project/compressed-tensors).

For a weight of N output and K input features, b bits, in groups of G (G = K: one scale per output feature, or one for all):

    pack-quantized   weight_packed       int32 [N, K * b / 32]       codes of neighbouring input features, the first in the lowest bits
                     weight_shape        int32 or int64 [2]          N and K
    int-quantized    weight              int8 [N, K]                 code - 2 ** (b - 1)
    both             weight_scale        float [N, K / G]            weight = scale * (code - zero)
                     weight_zero_point   int32 [N * b / 32, K / G]   packed along N, or int8 [N, K / G]; absent when symmetric
                     weight_g_idx        int32 [K]                   the group of each input feature; absent, or -1, when in order

    float-quantized  weight              float8_e4m3fn [N, K], with weight_scale and input_scale; see fp8.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import Float8Tensor, QuantizedTensor
from penstock.execution.quantization.fp8 import float8_cuts, float8_layout, read_float8
from penstock.execution.quantization.packing import quantized_tensor, unpack_columns
from penstock.execution.quantization.registry import (
    Axis,
    Cuts,
    Parts,
    WeightLayout,
    check_shape,
    checked_layout,
    group_axis,
    in_order,
)


class CompressedTensorsFormat:
    """Reads one weight of a compressed-tensors checkpoint. Its tensors say in which of the formats it is, so layers may differ.

    block: output and input features that share a scale of 8-bit floats, where there is more than one.
    """

    anchors = ("weight_packed", "weight")
    parts = (
        "weight_packed",
        "weight",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
    )

    def __init__(self, block: tuple[int, int] | None = None) -> None:
        self._block = block

    def layout(self, parts: Parts) -> WeightLayout:
        """See CheckpointFormat."""
        if _is_float8(parts):
            return float8_layout(parts, "weight_scale", self._block)
        packed = "weight_packed" in parts
        shape = parts.shape("weight_packed" if packed else "weight")
        if len(shape) != 2:
            raise ModelFormatError(f"the weight must be a matrix, not of shape {list(shape)}.")
        rows, columns, bits = (*shape, 8)
        if packed:
            check_shape(parts, "weight_shape", (2,))
            columns = int(parts.read("weight_shape")[1])
            if columns < 1 or shape[1] * 32 % columns:
                raise ModelFormatError(f"weight_packed of shape {list(shape)} cannot hold {columns} input features.")
            bits = shape[1] * 32 // columns
        if "weight_g_idx" in parts:
            check_shape(parts, "weight_g_idx", (columns,))
        return checked_layout(rows, columns, bits, _groups(parts, rows))

    def cuts(self, parts: Parts, layout: WeightLayout) -> Cuts:
        """See CheckpointFormat. Scattered groups cannot be cut along input features."""
        if _is_float8(parts):
            return float8_cuts(parts, "weight_scale", layout)
        group_index = _group_index(parts)
        ordered = group_index is None or in_order(group_index, layout)
        per, groups = 32 // layout.bits, group_axis(layout) if ordered else None
        columns = 1 if ordered else layout.columns
        cuts: dict[str, tuple[Axis | None, ...] | None] = {
            "weight": (Axis("rows"), Axis("columns", 1, columns)),
            "weight_packed": (Axis("rows"), Axis("columns", per, -(-columns // per))),
        }
        if ordered:
            cuts["weight_g_idx"] = None
        for part in ("weight_scale", "weight_zero_point"):
            if part in parts and math.prod(parts.shape(part)) > 1:
                packed = part == "weight_zero_point" and parts.dtype(part) == torch.int32
                axes = (Axis("rows", per if packed else 1), groups)
                cuts[part] = axes[: len(parts.shape(part))]
        return cuts

    def decode(self, parts: Parts, layout: WeightLayout) -> QuantizedTensor | Float8Tensor:
        """See CheckpointFormat."""
        if _is_float8(parts):
            return read_float8(parts, "weight_scale", layout)
        groups = layout.columns // layout.group_size
        packed = "weight_packed" in parts
        codes = (
            unpack_columns(parts.read("weight_packed"), layout.bits) if packed else _unsigned(parts.read("weight"), 8)
        )
        scales = parts.read("weight_scale").reshape(-1, groups).expand(layout.rows, groups)
        zeros = _zeros(parts, layout) if "weight_zero_point" in parts else None
        return quantized_tensor(codes, layout, scales, zeros, _group_index(parts))


def _is_float8(parts: Parts) -> bool:
    return "weight" in parts and parts.dtype("weight").is_floating_point


def _groups(parts: Parts, rows: int) -> int:
    """Scales per output feature. One scale for the whole tensor counts as the same one for every feature."""
    shape = parts.shape("weight_scale")
    if len(shape) == 2 and shape[0] == rows:
        return shape[1]
    if shape in ((), (1,), (1, 1), (rows,)):
        return 1
    raise ModelFormatError(f"weight_scale has shape {list(shape)} where [{rows}, groups] is needed.")


def _group_index(parts: Parts) -> Tensor | None:
    """The group of each input feature; None when they are in order."""
    if "weight_g_idx" not in parts:
        return None
    group_index = parts.read("weight_g_idx")
    return None if bool((group_index == -1).all()) else group_index


def _zeros(parts: Parts, layout: WeightLayout) -> Tensor:
    """Zero points as unsigned codes [N, K / group_size], or the same one for all rows."""
    stored = parts.read("weight_zero_point")
    groups = layout.columns // layout.group_size
    if stored.dtype == torch.int32:
        check_shape(parts, "weight_zero_point", (-(-layout.rows * layout.bits // 32), groups))
        return unpack_columns(stored.t(), layout.bits).t()[: layout.rows]
    if stored.dtype != torch.int8 or stored.numel() not in (1, layout.rows * groups):
        raise ModelFormatError(
            f"weight_zero_point has type {stored.dtype} and shape {list(stored.shape)}; needed are int8 or int32 numbers, one for a scale."
        )
    return _unsigned(stored, layout.bits).reshape(-1, groups).expand(layout.rows, groups)


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """int8 → uint8, shifted by 2 ** (bits - 1)."""
    if values.dtype != torch.int8:
        raise ModelFormatError(f"codes of type {values.dtype} are not supported; supported: int8.")
    return values.view(torch.uint8) + (1 << (bits - 1))
