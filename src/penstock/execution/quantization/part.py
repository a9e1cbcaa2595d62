"""A part of one quantised weight, of which only that part is read.

Formats pack several features into an element and share scales among them, so the part is first made larger, to the next features between
which everything can be cut. That is what is read and decoded, as if it were a weight of its own; and of the result what was asked for.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import CompactWeight, StoredWeight, part_of
from penstock.execution.parallel.sharding import Shard
from penstock.execution.quantization.registry import Axis, CheckpointFormat, Cuts, CuttableParts, WeightLayout

logger = logging.getLogger(__name__)


def read_part(
    form: CheckpointFormat, parts: CuttableParts, layout: WeightLayout, shard: Shard, where: str
) -> StoredWeight:
    """The numbers that `shard` has in the whole weight, in fewer bits or, where no groups can hold them, float32.

    where: the weight, for a line in the log in the latter case. Raises ModelFormatError like the format.
    """
    rows, columns = shard.rows or (0, layout.rows), shard.columns or (0, layout.columns)
    cuts = form.cuts(parts, layout)
    if cuts is None:
        return cut_weight(form.decode(parts, layout), rows, columns, where)
    region = _region(cuts, layout, rows, columns)
    value = form.decode(_CutParts(parts, cuts, layout, region), _part_layout(layout, region))
    (first_row, _), (first_column, _) = region.rows, region.columns
    return cut_weight(
        value,
        (rows[0] - first_row, rows[1] - first_row),
        (columns[0] - first_column, columns[1] - first_column),
        where,
    )


def cut_weight(value: CompactWeight, rows: tuple[int, int], columns: tuple[int, int], where: str) -> StoredWeight:
    """`part_of`, with a line in the log when the part is floats. where: the weight, for that line."""
    if (rows, columns) == ((0, value.shape[0]), (0, value.shape[1])):
        return value
    part = part_of(value, rows, columns)
    if isinstance(part, Tensor):
        reason = "the borders of the part cut its groups of input features too finely"
        if getattr(value, "input_order", None) is not None:
            reason = (
                "its groups are scattered over the input features (act-order), so that no part has groups of one size"
            )
        logger.warning("%s: kept as float32 on this rank, because %s", where, reason)
    return part


@dataclass(frozen=True)
class _Region:
    """Output features [start, stop) and input features [start, stop) of a weight."""

    rows: tuple[int, int]
    columns: tuple[int, int]


class _CutParts:
    """The pieces of a weight's parts that belong to a region of it; see Parts."""

    def __init__(self, parts: CuttableParts, cuts: Cuts, layout: WeightLayout, region: _Region) -> None:
        self._parts = parts
        self._cuts = cuts
        self._layout = layout
        self._region = region

    def __contains__(self, part: str) -> bool:
        return part in self._parts and self._cuts.get(part, ()) is not None

    def shape(self, part: str) -> tuple[int, ...]:
        axes = self._cuts.get(part)
        return self._shard(axes).shape(self._whole_shape(part, axes)) if axes else self._parts.shape(part)

    def dtype(self, part: str) -> torch.dtype:
        return self._parts.dtype(part)

    def read(self, part: str) -> Tensor:
        axes = self._cuts.get(part)
        if not axes:
            return self._parts.read(part)
        return self._parts.read_piece(part, self._whole_shape(part, axes), self._shard(axes))

    def _whole_shape(self, part: str, axes: tuple[Axis | None, ...]) -> tuple[int, ...]:
        """The shape that the axes give to the part of the whole weight."""
        rows, columns = self._layout.rows, self._layout.columns
        sizes = {"rows": rows, "columns": columns, "numbers": rows * columns}
        stored = self._parts.shape(part)
        return tuple(
            stored[place] if axis is None else -(-sizes[axis.along] // axis.per) for place, axis in enumerate(axes)
        )

    def _shard(self, axes: tuple[Axis | None, ...]) -> Shard:
        return Shard(*(self._range(axis) for axis in axes))

    def _range(self, axis: Axis | None) -> tuple[int, int] | None:
        """The elements along an axis."""
        if axis is None:
            return None
        start, stop = self._region.columns if axis.along == "columns" else self._region.rows
        if axis.along == "numbers":
            start, stop = start * self._layout.columns, stop * self._layout.columns
        return start // axis.per, -(-stop // axis.per)


def _region(cuts: Cuts, layout: WeightLayout, rows: tuple[int, int], columns: tuple[int, int]) -> _Region:
    """The smallest region around these features at whose borders no element of any part is cut."""
    row_step = column_step = 1
    for axis in (axis for axes in cuts.values() for axis in axes or () if axis is not None):
        if axis.along == "rows":
            row_step = math.lcm(row_step, axis.per * axis.multiple)
        elif axis.along == "columns":
            column_step = math.lcm(column_step, axis.per * axis.multiple)
    return _Region(_widened(rows, row_step, layout.rows), _widened(columns, column_step, layout.columns))


def _widened(span: tuple[int, int], step: int, size: int) -> tuple[int, int]:
    return span[0] // step * step, min(size, -(-span[1] // step) * step)


def _part_layout(layout: WeightLayout, region: _Region) -> WeightLayout:
    """The layout of a region as a weight of its own: what was a whole row or column is one of the region."""
    rows, columns = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
    return replace(
        layout,
        rows=rows,
        columns=columns,
        group_size=columns if layout.group_size == layout.columns else layout.group_size,
        row_block=rows if layout.row_block == layout.rows else layout.row_block,
        start=(region.rows[0], region.columns[0]),
        whole_columns=layout.columns,
    )
