"""Checkpoints in 8-bit floats (e4m3, as in Micikevicius et al., 2022, arXiv:2209.05433), and plain weights rounded to them at load.

For a weight of N output and K input features, in blocks of R x C:

    weight             float8_e4m3fn [N, K]
    weight_scale_inv   float [ceil(N / R), ceil(K / C)]    weight = code * scale, whatever its name says   (DeepSeek, Qwen3, transformers)
    weight_scale       the same, or one number, or one per output feature                                 (vLLM, compressed-tensors)
    input_scale        one number: the layer's input is divided by it and rounded to e4m3; absent: a scale is found for each token
    activation_scale   the name that transformers has for input_scale
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import Float8Tensor
from penstock.execution.quantization.registry import Axis, Cuts, Parts, WeightLayout, group_axis

LARGEST_E4M3 = 448.0

# Sides of a block that are not a whole row or column, or a single output feature, are multiples of this.
_BLOCK_MULTIPLE = 16

# Weights that are rounded at a time: their float32 copies stay small.
_ROUNDED_AT_ONCE = 1 << 20


class Float8Format:
    """Reads one weight of a checkpoint whose quant_method is 'fp8'. block: output and input features that share a scale, where there is
    more than one."""

    anchors = ("weight",)
    parts = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale")

    def __init__(self, block: tuple[int, int] | None) -> None:
        self._block = block

    def layout(self, parts: Parts) -> WeightLayout:
        """See CheckpointFormat."""
        return float8_layout(parts, _scale_part(parts), self._block)

    def cuts(self, parts: Parts, layout: WeightLayout) -> Cuts:
        """See CheckpointFormat."""
        return float8_cuts(parts, _scale_part(parts), layout)

    def decode(self, parts: Parts, layout: WeightLayout) -> Float8Tensor:
        """See CheckpointFormat."""
        return read_float8(parts, _scale_part(parts), layout)


def float8_layout(parts: Parts, scale_part: str, block: tuple[int, int] | None) -> WeightLayout:
    """The layout of `weight` and its scales. `block` is asked only when there are several scales in both directions. Raises
    ModelFormatError."""
    shape = parts.shape("weight")
    if len(shape) != 2 or 0 in shape:
        raise ModelFormatError(f"the weight must be a matrix, not of shape {list(shape)}.")
    if parts.dtype("weight") != torch.float8_e4m3fn:
        raise ModelFormatError(f"codes of type {parts.dtype('weight')} are not supported; supported: float8_e4m3fn.")
    rows, columns = shape
    row_block, group_size = _block_of(rows, columns, parts.shape(scale_part), block)
    uneven_rows = row_block not in (1, rows) and row_block % _BLOCK_MULTIPLE != 0
    uneven_columns = group_size != columns and group_size % _BLOCK_MULTIPLE != 0
    if uneven_rows or uneven_columns:
        raise ModelFormatError(
            f"blocks of {row_block} x {group_size} are not supported; supported are multiples of {_BLOCK_MULTIPLE}."
        )
    return WeightLayout(rows, columns, 8, group_size, row_block)


def float8_cuts(parts: Parts, scale_part: str, layout: WeightLayout) -> Cuts:
    """How the parts of a layout from `float8_layout` can be cut; see CheckpointFormat."""
    cuts: dict[str, tuple[Axis | None, ...] | None] = {"weight": (Axis("rows"), Axis("columns"))}
    shape = parts.shape(scale_part)
    if math.prod(shape) > 1:
        rows = Axis("rows", layout.row_block) if layout.row_block < layout.rows else None
        cuts[scale_part] = (rows, group_axis(layout))[: len(shape)]
    return cuts


def read_float8(parts: Parts, scale_part: str, layout: WeightLayout) -> Float8Tensor:
    """The weight of a layout from `float8_layout`. Raises ModelFormatError for scales that are no finite floats."""
    block = (layout.row_block, layout.group_size)
    scales = _floats(parts, scale_part).reshape(-(-layout.rows // block[0]), -(-layout.columns // block[1]))
    input_part = next((part for part in ("input_scale", "activation_scale") if part in parts), None)
    activation_scale = None
    if input_part is not None:
        stored = _floats(parts, input_part)
        if stored.numel() != 1 or float(stored) <= 0:
            raise ModelFormatError(f"{input_part} must be one number above 0.")
        activation_scale = float(stored)
    return Float8Tensor(parts.read("weight"), block, scales, activation_scale)


@dataclass(frozen=True)
class Float8Rounding:
    """Rounds plain weights to 8-bit floats with one scale per output feature; the largest magnitude of each becomes 448.

    device: where it is done; on a GPU it takes no time beside reading the weight.
    """

    device: torch.device

    def begin(self, rows: int, columns: int) -> RoundedFloat8:
        """See WeightRounding."""
        return RoundedFloat8(rows, columns, self.device)

    def of_part(self, columns: int, part: tuple[int, int]) -> Float8Rounding | None:
        """See WeightRounding."""
        return self if part == (0, columns) else None


class RoundedFloat8:
    """A weight [rows, columns] that is rounded as its rows come in."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
        self._scales = torch.empty(rows, 1, device=device)

    def put(self, start: int, weight: Tensor) -> None:
        """Round float rows [n, columns] into the rows from `start` on. Raises ValueError when one holds infinity or NaN."""
        step = max(1, _ROUNDED_AT_ONCE // max(1, weight.shape[1]))
        for first in range(0, len(weight), step):
            rows = weight[first : first + step].to(self._codes.device, torch.float32)
            target = slice(start + first, start + first + len(rows))
            self._codes[target], self._scales[target] = _round_rows(rows, torch.float32)
        if not bool(torch.isfinite(self._scales[start : start + len(weight)]).all()):
            raise ValueError("it holds infinity or NaN, which cannot be rounded")

    def tensor(self) -> Float8Tensor:
        """The weight, once all rows are in."""
        return Float8Tensor(self._codes, (1, self._codes.shape[1]), self._scales)


def round_float8(weight: Tensor, scale_dtype: torch.dtype) -> Float8Tensor:
    """Round float32 [N, K] with one scale per output feature, each such as `scale_dtype`, the type it is stored in, can hold."""
    codes, scales = _round_rows(weight, scale_dtype)
    return Float8Tensor(codes, (1, weight.shape[1]), scales)


def round_inputs_to_float8(x: Tensor) -> Tensor:
    """x [T, K] as it is after rounding to 8-bit floats, a scale per token."""
    codes, scales = _round_rows(x, torch.float32)
    return codes.to(x.dtype) * scales


def _round_rows(rows: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 [n, K] → codes float8_e4m3fn [n, K], scales float32 [n, 1]; a row of zeros has the scale 1."""
    scales = (rows.abs().amax(dim=1, keepdim=True) / LARGEST_E4M3).to(scale_dtype).to(torch.float32)
    scales = torch.where(scales == 0, 1.0, scales)
    # A scale that was rounded down would take the largest number beyond what e4m3 holds, which has no infinity but NaN.
    return (rows / scales).clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scales


def _scale_part(parts: Parts) -> str:
    return "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"


def _block_of(rows: int, columns: int, scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Output and input features that share one of the scales of this shape."""
    if block is not None and scales == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if math.prod(scales) == 1:
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if len(scales) == 2 and scales[0] == rows and columns % max(1, scales[1]) == 0:
        return 1, columns // max(1, scales[1])
    wanted = "" if block is None else f", or a scale for each block of {block[0]} x {block[1]}"
    raise ModelFormatError(
        f"scales have shape {list(scales)} for a weight of shape {[rows, columns]}; needed are one, one per output feature{wanted}."
    )


def _floats(parts: Parts, part: str) -> Tensor:
    """float32. Raises ModelFormatError for anything but finite floats."""
    values = parts.read(part)
    if not values.is_floating_point():
        raise ModelFormatError(f"{part} has the type {values.dtype}; needed are floating-point numbers.")
    values = values.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ModelFormatError(f"{part} holds infinity or NaN.")
    return values.contiguous()
