"""Counts in which precision the weights of a model are, and says it in a few words."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from torch import Tensor

from penstock.execution.kernels.linear import PackedWeight
from penstock.execution.kernels.quantized import CompactWeight, Float8Tensor, QuantizedTensor, StoredWeight
from penstock.execution.layers.weight import SlotRole

_Precision = tuple[Literal["float", "quantized"], str]


class PrecisionCensus:
    """What was loaded, by the role of the weight. Norms and biases do not count.

    widened: the type that weights in 8-bit floats and codebooks are turned into, where no kernel computes with them as they are.
    """

    def __init__(self, widened: str | None = None) -> None:
        self._weights: dict[SlotRole, Counter[_Precision]] = {}
        self._widened = widened

    def add(self, role: SlotRole, value: StoredWeight) -> None:
        """A tensor that a layer has taken."""
        if isinstance(value, Tensor):
            self._count(role, ("float", str(value.dtype).removeprefix("torch.")), value.numel())
        else:
            self._count(role, self._compact(value), value.codes.numel())

    def add_packed(self, role: SlotRole, weight: PackedWeight) -> None:
        """A weight that was packed before."""
        precision: _Precision = ("float", weight.kind)
        if weight.kind in ("int8", "int4"):
            precision = _quantized(8 if weight.kind == "int8" else 4, weight.group_size, weight.in_features)
        self._count(role, precision, weight.out_features * weight.in_features)

    def text(self, computed_as: str | None = None) -> str:
        """'none', or for example 'int4 group 32, head int8' or 'fp8 block 128x128 as bfloat16, head bfloat16'. computed_as: the type that
        all quantised weights were turned back into."""
        counted = [precision for counter in self._weights.values() for precision in counter]
        if all(kind == "float" for kind, _ in counted):
            return "none"
        layers, head = self._described("linear"), self._described("head")
        words = [layers]
        if head != layers:
            words.append(f"head {head}")
        if any(kind == "quantized" for kind, _ in self._weights.get("table", ())):
            words.append(f"embeddings {self._described('table')}")
        text = ", ".join(words)
        return text if computed_as is None else f"{text}, computed as {computed_as}"

    def _compact(self, value: CompactWeight) -> _Precision:
        if isinstance(value, QuantizedTensor):
            return _quantized(value.bits, value.group_size, value.shape[1])
        suffix = "" if self._widened is None else f" as {self._widened}"
        name = _float8(value) if isinstance(value, Float8Tensor) else f"{value.name} group {value.group_size}"
        return "quantized", f"{name}{suffix}"

    def _described(self, role: SlotRole) -> str:
        """The most common precision first."""
        return " + ".join(name for (_, name), _ in self._weights.get(role, Counter()).most_common())

    def _count(self, role: SlotRole, precision: _Precision, weights: int) -> None:
        if role != "vector":
            self._weights.setdefault(role, Counter())[precision] += weights


def _float8(value: Float8Tensor) -> str:
    """Scales for whole weights and for output features are not told apart: they cost the same and hardly differ in quality."""
    rows, columns = value.shape
    height, width = value.block
    if width == columns and height in (1, rows):
        return "fp8"
    return f"fp8 group {width}" if height == 1 else f"fp8 block {height}x{width}"


def _quantized(bits: int, group_size: int, columns: int) -> _Precision:
    if group_size < columns:
        return "quantized", f"int{bits} group {group_size}"
    return "quantized", f"int{bits}" if bits == 8 else f"int{bits} per output feature"
