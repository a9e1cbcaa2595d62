"""The formats of quantised checkpoints that can be read, each turned into the canonical form by a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import SMALLEST_GROUP, CompactWeight
from penstock.execution.parallel.sharding import Shard

QuantizationMethod = Literal["awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes"]
QUANTIZATION_METHODS: tuple[str, ...] = get_args(QuantizationMethod)


@dataclass(frozen=True, kw_only=True)
class CheckpointQuantization:
    """What config.json says about how the checkpoint was quantised.

    bits, group_size: where the file gives one for the whole model; group_size None: one scale per output feature, or different ones.
    The tensors themselves say which layers are quantised and have the last word on their shapes.
    zero_shift: what is added to a stored zero point; 1 in the first version of GPTQ's format.
    codes: what weights are made of: integers, 8-bit floats or places in a codebook; 'mixed' when layers differ in it.
    block: output and input features that share a scale, for 8-bit floats with one scale a block.
    """

    method: QuantizationMethod
    bits: int | None = None
    group_size: int | None = None
    zero_shift: int = 0
    codes: Literal["integers", "fp8", "codebook", "mixed"] = "integers"
    block: tuple[int, int] | None = None


class Parts(Protocol):
    """The tensors of a checkpoint that make up one quantised weight, or pieces of them, by the end of their names, such as 'qweight' or
    'weight.absmax'."""

    def __contains__(self, part: str) -> bool: ...

    def shape(self, part: str) -> tuple[int, ...]:
        """Raises ModelFormatError when the checkpoint has no such tensor for this weight."""
        ...

    def dtype(self, part: str) -> torch.dtype:
        """Raises ModelFormatError when the checkpoint has no such tensor for this weight."""
        ...

    def read(self, part: str) -> Tensor:
        """As it is stored. Raises ModelFormatError when the checkpoint has no such tensor for this weight."""
        ...


class CuttableParts(Parts, Protocol):
    """Tensors of which pieces can be read."""

    def read_piece(self, part: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        """The shard of the part, seen as a tensor of `shape`, in the type that it is stored in. Raises ModelFormatError when the checkpoint
        has no such tensor for this weight."""
        ...


@dataclass(frozen=True)
class WeightLayout:
    """The size of one quantised weight: N output features, K input features, `group_size` of them to a scale (K: one scale a row).

    row_block: output features that share a scale; always 1 but for 8-bit floats. start: the output and the input feature with which it
    begins, where it is a part of a weight, and whole_columns that weight's input features; None: it is no part.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    row_block: int = 1
    start: tuple[int, int] = (0, 0)
    whole_columns: int | None = None


@dataclass(frozen=True)
class Axis:
    """What one dimension of a stored part runs along: the output features of the weight ('rows'), its input features ('columns'), or all
    its numbers, row after row. per: how many of them one element stands for. multiple: pieces begin and end at multiples of this many
    elements. Along 'numbers', pieces have all elements with something of their rows, also at their ends.
    """

    along: Literal["rows", "columns", "numbers"]
    per: int = 1
    multiple: int = 1


# What to read of each part for a part of the weight. A tuple has an axis for each dimension, None where it is the same for all features; a
# part that is stored in another shape is read as if it had these dimensions. Parts that are not there are read whole. None instead of a
# tuple: the part says nothing that the part of the weight needs.
Cuts = Mapping[str, tuple[Axis | None, ...] | None]


class CheckpointFormat(Protocol):
    """How one format stores a weight.

    anchors: the parts that tell; a module with one of them, of a type that only codes have, is quantised. parts: all that may be there.
    """

    @property
    def anchors(self) -> tuple[str, ...]: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def layout(self, parts: Parts) -> WeightLayout:
        """From the shapes of the parts. Raises ModelFormatError when they contradict each other or cannot be computed with."""
        ...

    def cuts(self, parts: Parts, layout: WeightLayout) -> Cuts | None:
        """How the parts can be cut, so that `decode` makes of the pieces what they are of the weight; None: not at all."""
        ...

    def decode(self, parts: Parts, layout: WeightLayout) -> CompactWeight:
        """The canonical form. `parts` and `layout` may be those of a part of the weight, cut as `cuts` says. Raises ModelFormatError when
        it cannot hold the numbers."""
        ...


def checkpoint_format(quantization: CheckpointQuantization) -> CheckpointFormat:
    """The reader of a checkpoint's format."""
    from penstock.execution.quantization.awq import AWQFormat
    from penstock.execution.quantization.bitsandbytes import BitsAndBytesFormat
    from penstock.execution.quantization.compressed_tensors import CompressedTensorsFormat
    from penstock.execution.quantization.fp8 import Float8Format
    from penstock.execution.quantization.gptq import GPTQFormat

    formats: dict[QuantizationMethod, Callable[[], CheckpointFormat]] = {
        "awq": AWQFormat,
        "gptq": lambda: GPTQFormat(quantization.zero_shift),
        "compressed-tensors": lambda: CompressedTensorsFormat(quantization.block),
        "fp8": lambda: Float8Format(quantization.block),
        "bitsandbytes": BitsAndBytesFormat,
    }
    return formats[quantization.method]()


def holds_codes(dtype: torch.dtype) -> bool:
    """Whether a tensor of this type cannot be a plain weight: it holds integers or 8-bit floats."""
    return not dtype.is_floating_point or dtype.itemsize == 1


def group_axis(layout: WeightLayout) -> Axis | None:
    """The axis of a dimension with one element for each group of input features; None when there is one group."""
    return Axis("columns", layout.group_size) if layout.group_size < layout.columns else None


def in_order(group_index: Tensor, layout: WeightLayout) -> bool:
    """Whether groups [K] are consecutive input features, so that the index of a part says nothing more."""
    return torch.equal(group_index.to(torch.int64), torch.arange(layout.columns) // layout.group_size)


def checked_layout(rows: int, columns: int, bits: int, groups: int) -> WeightLayout:
    """A layout with `groups` scales per output feature. Raises ModelFormatError for what no kernel computes with."""
    if bits not in (4, 8):
        raise ModelFormatError(f"weights of {bits} bits are not supported; supported: 4 and 8.")
    if rows < 1 or columns < 1 or groups < 1 or columns % groups:
        raise ModelFormatError(f"{columns} input features cannot be divided into {groups} groups.")
    group_size = columns // groups
    if groups > 1 and group_size % SMALLEST_GROUP:
        raise ModelFormatError(
            f"groups of {group_size} input features are not supported; supported are multiples of {SMALLEST_GROUP}."
        )
    return WeightLayout(rows, columns, bits, group_size)


def check_shape(parts: Parts, part: str, expected: tuple[int, ...]) -> None:
    """Raise ModelFormatError unless the part has this shape."""
    if parts.shape(part) != expected:
        raise ModelFormatError(f"{part} has shape {list(parts.shape(part))} where {list(expected)} is needed.")
