"""The formats of quantised checkpoints that can be read, each turned into the canonical form by a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import CompactWeight

QuantizationMethod = Literal["awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes"]
QUANTIZATION_METHODS: tuple[str, ...] = get_args(QuantizationMethod)

# Input features that share a scale come in multiples of this; see QuantizedTensor.
_GROUP_MULTIPLE = 16


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
    """The tensors of a checkpoint that make up one quantised weight, by the end of their names, such as 'qweight' or 'weight.absmax'."""

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


@dataclass(frozen=True)
class WeightLayout:
    """The size of one quantised weight: N output features, K input features, `group_size` of them to a scale (K: one scale a row).

    row_block: output features that share a scale; always 1 but for 8-bit floats.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    row_block: int = 1


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

    def decode(self, parts: Parts, layout: WeightLayout) -> CompactWeight:
        """The canonical form. Raises ModelFormatError when it cannot hold the numbers."""
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


def checked_layout(rows: int, columns: int, bits: int, groups: int) -> WeightLayout:
    """A layout with `groups` scales per output feature. Raises ModelFormatError for what no kernel computes with."""
    if bits not in (4, 8):
        raise ModelFormatError(f"weights of {bits} bits are not supported; supported: 4 and 8.")
    if rows < 1 or columns < 1 or groups < 1 or columns % groups:
        raise ModelFormatError(f"{columns} input features cannot be divided into {groups} groups.")
    group_size = columns // groups
    if groups > 1 and group_size % _GROUP_MULTIPLE:
        raise ModelFormatError(
            f"groups of {group_size} input features are not supported; supported are multiples of {_GROUP_MULTIPLE}."
        )
    return WeightLayout(rows, columns, bits, group_size)


def check_shape(parts: Parts, part: str, expected: tuple[int, ...]) -> None:
    """Raise ModelFormatError unless the part has this shape."""
    if parts.shape(part) != expected:
        raise ModelFormatError(f"{part} has shape {list(parts.shape(part))} where {list(expected)} is needed.")
