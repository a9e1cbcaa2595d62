"""Checkpoints that transformers saved with bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes).

NF4 and FP4 (Dettmers et al., 2023, arXiv:2305.14314). The N * K numbers of a weight are one row of blocks of B (64), whatever N and K are:

    weight                                [N * K / 2, 1]      two codes a byte, the first in the high four bits; any type of storage
    weight.quant_map                      float32 [16]        the codebook
    weight.absmax                         float32 [blocks]    weight = codebook[code] * absmax of its block
    weight.quant_state.bitsandbytes__nf4  uint8 [bytes]       (or __fp4) JSON: shape, blocksize and what follows
    with double quantisation the absmax is itself a code, in blocks of nested_blocksize (256):
    weight.absmax                         uint8 [blocks]
    weight.nested_quant_map               float32 [256]
    weight.nested_absmax                  float32 [blocks of blocks]    absmax = map[code] * nested_absmax + nested_offset

LLM.int8 (Dettmers et al., 2022, arXiv:2208.07339):

    weight   int8 [N, K]        SCB   float32 [N]    weight = code * SCB / 127        weight_format   uint8: 0, rows in order
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import CodebookTensor, QuantizedTensor
from penstock.execution.quantization.registry import (
    Axis,
    Cuts,
    Parts,
    WeightLayout,
    check_shape,
    checked_layout,
)

_STATES = {
    "weight.quant_state.bitsandbytes__nf4": "nf4",
    "weight.quant_state.bitsandbytes__fp4": "fp4",
}
# The JSON is some 170 bytes long.
_MAX_STATE_BYTES = 4096
_STATE_FIELDS = {
    "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
}  # fmt: skip
_MAX_SIZE = 2**31


class BitsAndBytesFormat:
    """Reads one weight of a bitsandbytes checkpoint. Its tensors say whether it has 4 or 8 bits, so layers may differ."""

    anchors = (*_STATES, "weight")
    parts = (
        *_STATES, "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "SCB", "weight_format",
    )  # fmt: skip

    def layout(self, parts: Parts) -> WeightLayout:
        """See CheckpointFormat."""
        if "SCB" in parts:
            return _int8_layout(parts)
        state = _read_state(parts)
        rows, columns = state.shape
        if parts.dtype("weight").itemsize * math.prod(parts.shape("weight")) != -(-rows * columns // 2):
            raise ModelFormatError(
                f"weight has shape {list(parts.shape('weight'))}, which does not hold {rows} x {columns} codes."
            )
        blocks = -(-rows * columns // state.block_size)
        check_shape(parts, "weight.absmax", (blocks,))
        check_shape(parts, "weight.quant_map", (16,))
        if state.nested_block_size is not None:
            check_shape(parts, "weight.nested_absmax", (-(-blocks // state.nested_block_size),))
            check_shape(parts, "weight.nested_quant_map", (256,))
        # A block may go on in the next row; the numbers of a group are then the part of it that no row divides.
        return checked_layout(rows, columns, 4, columns // math.gcd(columns, state.block_size))

    def cuts(self, parts: Parts, layout: WeightLayout) -> Cuts | None:
        """See CheckpointFormat. Numbers that share a scale stay together, and so do those of one stored element, which may be 4 bytes."""
        if "SCB" in parts:
            return {"weight": (Axis("rows"), Axis("columns")), "SCB": (Axis("rows"),)}
        state = _read_state(parts)
        per = 2 * parts.dtype("weight").itemsize
        if layout.columns % per:
            # Rows do not begin with elements.
            return None
        together = math.lcm(per, layout.group_size) // per
        return {
            "weight": (Axis("rows"), Axis("columns", per, together)),
            "weight.absmax": (Axis("numbers", state.block_size),),
        }

    def decode(self, parts: Parts, layout: WeightLayout) -> QuantizedTensor | CodebookTensor:
        """See CheckpointFormat."""
        if "SCB" in parts:
            codes = parts.read("weight").view(torch.uint8) + 128
            scales = _floats(parts, "SCB").view(-1, 1) / 127
            return QuantizedTensor(codes, 8, layout.columns, scales)
        state = _read_state(parts)
        packed = parts.read("weight").contiguous().view(torch.uint8).flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: layout.rows * layout.columns]
        groups = layout.columns // layout.group_size
        row_length = layout.whole_columns or layout.columns
        first_block = layout.start[0] * row_length // state.block_size
        rows = (layout.start[0] + torch.arange(layout.rows)) * row_length
        starts = rows.unsqueeze(1) + layout.start[1] + torch.arange(groups) * layout.group_size
        scales = _block_scales(parts, state, first_block)[starts.flatten() // state.block_size - first_block]
        return CodebookTensor(
            codes.view(layout.rows, layout.columns),
            _floats(parts, "weight.quant_map"),
            layout.group_size,
            scales.view(layout.rows, groups),
            state.name,
        )


@dataclass(frozen=True)
class _State:
    """What the JSON of a 4-bit weight says. block_size: numbers that share an absmax; nested_block_size: absmaxes that share one of their
    own, None when they are floats."""

    name: str
    shape: tuple[int, int]
    block_size: int
    nested_block_size: int | None
    nested_offset: float


def _read_state(parts: Parts) -> _State:
    """Raises ModelFormatError for anything that bitsandbytes would not have written."""
    found = [part for part in _STATES if part in parts]
    if len(found) != 1:
        raise ModelFormatError(f"needed is exactly one of {', '.join(_STATES)}; {len(found)} are there.")
    part = found[0]
    if parts.dtype(part) != torch.uint8 or not 0 < math.prod(parts.shape(part)) <= _MAX_STATE_BYTES:
        raise ModelFormatError(f"{part} must be 1 to {_MAX_STATE_BYTES} bytes of JSON.")
    try:
        state = json.loads(parts.read(part).numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{part} is not valid JSON.") from error
    if not isinstance(state, dict) or not state.keys() <= _STATE_FIELDS:
        raise ModelFormatError(
            f"{part} must be an object with no other fields than {', '.join(sorted(_STATE_FIELDS))}."
        )
    if state.get("quant_type") != _STATES[part]:
        raise ModelFormatError(f"{part}: quant_type is {state.get('quant_type')!r}.")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise ModelFormatError(f"{part}: shape must be two integers, not {shape!r}.")
    rows, columns = (_size(part, "shape", size) for size in shape)
    nested = "weight.nested_absmax" in parts
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ModelFormatError(f"{part}: nested_offset must be a finite number, not {offset!r}.")
    return _State(
        _STATES[part],
        (rows, columns),
        _size(part, "blocksize", state.get("blocksize")),
        _size(part, "nested_blocksize", state.get("nested_blocksize")) if nested else None,
        float(offset),
    )


def _size(part: str, name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < _MAX_SIZE:
        raise ModelFormatError(f"{part}: {name} must be made of integers from 1 to {_MAX_SIZE - 1}, not {value!r}.")
    return value


def _block_scales(parts: Parts, state: _State, first: int) -> Tensor:
    """float32 [blocks], of the blocks from number `first` on, rounded in every step as bitsandbytes does."""
    if state.nested_block_size is None:
        return _floats(parts, "weight.absmax")
    codes = parts.read("weight.absmax")
    if codes.dtype != torch.uint8:
        raise ModelFormatError(f"weight.absmax has the type {codes.dtype}; with nested_absmax it must be uint8.")
    blocks = torch.arange(first, first + len(codes))
    nested = _floats(parts, "weight.nested_absmax")[blocks // state.nested_block_size]
    return _floats(parts, "weight.nested_quant_map")[codes.to(torch.int64)] * nested + state.nested_offset


def _int8_layout(parts: Parts) -> WeightLayout:
    shape = parts.shape("weight")
    if len(shape) != 2 or parts.dtype("weight") != torch.int8:
        raise ModelFormatError(f"weight must be a matrix of int8, not {parts.dtype('weight')} of shape {list(shape)}.")
    check_shape(parts, "SCB", (shape[0],))
    if "weight_format" in parts and (
        parts.shape("weight_format") not in ((), (1,)) or int(parts.read("weight_format")) != 0
    ):
        raise ModelFormatError(
            "weight_format is not 0 (rows in order); save the model again with bitsandbytes 0.45 or later."
        )
    return checked_layout(shape[0], shape[1], 8, 1)


def _floats(parts: Parts, part: str) -> Tensor:
    """float32. Raises ModelFormatError for anything but finite floats."""
    values = parts.read(part)
    if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise ModelFormatError(f"{part} must hold finite floating-point numbers; it has the type {values.dtype}.")
    return values.to(torch.float32)
