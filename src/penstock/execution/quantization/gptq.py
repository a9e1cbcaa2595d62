"""Checkpoints in the format of AutoGPTQ and GPTQModel (Frantar et al., 2022, arXiv:2210.17323).

For a weight of N output and K input features, b bits, in groups of G:

    qweight   int32 [K * b / 32, N]       32 / b codes of neighbouring input features, the first in the lowest bits
    qzeros    int32 [K / G, N * b / 32]   zero points of neighbouring output features, packed likewise; version 1 stores them less one
    scales    float16 [K / G, N]          weight = scale * (code - zero)
    g_idx     int32 [K]                   the group of each input feature; scattered after quantising in the order of activations
"""

from __future__ import annotations

import torch

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import QuantizedTensor
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


class GPTQFormat:
    """Reads one weight of a GPTQ checkpoint. Bits and group size come from the shapes, so layers may differ in them.

    zero_shift: what is added to a stored zero point: 1 in version 1 of the format, 0 in version 2.
    """

    anchors = ("qweight",)
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, zero_shift: int) -> None:
        self._zero_shift = zero_shift

    def layout(self, parts: Parts) -> WeightLayout:
        """See CheckpointFormat."""
        if any(len(parts.shape(part)) != 2 for part in ("qweight", "qzeros", "scales")):
            raise ModelFormatError("qweight, qzeros and scales must be matrices.")
        packed_columns, rows = parts.shape("qweight")
        groups = parts.shape("scales")[0]
        check_shape(parts, "scales", (groups, rows))
        bits = 32 * parts.shape("qzeros")[1] // max(1, rows)
        if bits not in (4, 8):
            raise ModelFormatError(f"weights of {bits} bits are not supported; supported: 4 and 8.")
        check_shape(parts, "qzeros", (groups, rows * bits // 32))
        columns = packed_columns * 32 // bits
        if "g_idx" in parts:
            check_shape(parts, "g_idx", (columns,))
        return checked_layout(rows, columns, bits, groups)

    def cuts(self, parts: Parts, layout: WeightLayout) -> Cuts:
        """See CheckpointFormat. Scattered groups cannot be cut along input features."""
        per, rows = 32 // layout.bits, Axis("rows")
        if "g_idx" in parts and not in_order(parts.read("g_idx"), layout):
            whole = Axis("columns", per, layout.columns // per)
            return {"qweight": (whole, rows), "qzeros": (None, Axis("rows", per)), "scales": (None, rows)}
        groups = group_axis(layout)
        return {
            "qweight": (Axis("columns", per), rows),
            "qzeros": (groups, Axis("rows", per)),
            "scales": (groups, rows),
            "g_idx": None,
        }

    def decode(self, parts: Parts, layout: WeightLayout) -> QuantizedTensor:
        """See CheckpointFormat."""
        codes = unpack_columns(parts.read("qweight").t(), layout.bits)
        zeros = unpack_columns(parts.read("qzeros"), layout.bits).t().to(torch.int16) + self._zero_shift
        group_index = parts.read("g_idx") if "g_idx" in parts else None
        return quantized_tensor(codes, layout, parts.read("scales").t(), zeros, group_index)
