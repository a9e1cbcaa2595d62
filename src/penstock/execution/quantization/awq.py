"""Checkpoints in AutoAWQ's `gemm` format (Lin et al., 2023, arXiv:2306.00978; https://github.com/casper-hansen/AutoAWQ).

For a weight of N output and K input features, in groups of G:

    qweight   int32 [K, N / 8]       8 codes of neighbouring output features; bits 4 i to 4 i + 3 hold number (0 2 4 6 1 3 5 7)[i]
    qzeros    int32 [K / G, N / 8]   zero points, packed likewise
    scales    float16 [K / G, N]     weight = scale * (code - zero)
"""

from __future__ import annotations

from torch import Tensor

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
)

_BITS = 4
_PER_INTEGER = 8
# Where the code of each of eight neighbouring output features lies among the eight of an integer.
_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQFormat:
    """Reads one weight of an AWQ checkpoint."""

    anchors = ("qweight",)
    parts = ("qweight", "qzeros", "scales")

    def layout(self, parts: Parts) -> WeightLayout:
        """See CheckpointFormat."""
        columns, packed_rows = _two(parts, "qweight")
        groups, rows = _two(parts, "scales")
        check_shape(parts, "qweight", (columns, rows // _PER_INTEGER))
        check_shape(parts, "qzeros", (groups, packed_rows))
        return checked_layout(packed_rows * _PER_INTEGER, columns, _BITS, groups)

    def cuts(self, parts: Parts, layout: WeightLayout) -> Cuts:
        """See CheckpointFormat."""
        groups, packed = group_axis(layout), Axis("rows", _PER_INTEGER)
        return {"qweight": (Axis("columns"), packed), "qzeros": (groups, packed), "scales": (groups, Axis("rows"))}

    def decode(self, parts: Parts, layout: WeightLayout) -> QuantizedTensor:
        """See CheckpointFormat."""
        codes = _unpack(parts.read("qweight"))
        return quantized_tensor(codes.t(), layout, parts.read("scales").t(), _unpack(parts.read("qzeros")).t())


def _unpack(packed: Tensor) -> Tensor:
    """int32 [R, N / 8] → uint8 [R, N]."""
    rows = packed.shape[0]
    return unpack_columns(packed, _BITS).view(rows, -1, _PER_INTEGER)[:, :, list(_POSITIONS)].reshape(rows, -1)


def _two(parts: Parts, part: str) -> tuple[int, int]:
    """The shape of a part that must be a matrix; anything else compares unequal to what is needed."""
    shape = parts.shape(part)
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
