"""Counts in which precision the weights of a model are, and says it in a few words."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from torch import Tensor

from penstock.execution.kernels.linear import PackedWeight
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.layers.weight import SlotRole

_Precision = tuple[Literal["float", "quantized"], str]


class PrecisionCensus:
    """What was loaded, by the role of the weight. Norms and biases do not count."""

    def __init__(self) -> None:
        self._weights: dict[SlotRole, Counter[_Precision]] = {}

    def add(self, role: SlotRole, value: Tensor | QuantizedTensor) -> None:
        """A tensor that a layer has taken."""
        if isinstance(value, QuantizedTensor):
            precision = _quantized(value.bits, value.group_size, value.shape[1])
            self._count(role, precision, value.codes.numel())
        else:
            self._count(role, ("float", str(value.dtype).removeprefix("torch.")), value.numel())

    def add_packed(self, role: SlotRole, weight: PackedWeight) -> None:
        """A weight that was packed before."""
        precision: _Precision = ("float", weight.kind)
        if weight.kind in ("int8", "int4"):
            precision = _quantized(8 if weight.kind == "int8" else 4, weight.group_size, weight.in_features)
        self._count(role, precision, weight.out_features * weight.in_features)

    def text(self, computed_as: str | None = None) -> str:
        """'none', or for example 'int4 group 32, head int8'. computed_as: the type that quantised weights were turned back into."""
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

    def _described(self, role: SlotRole) -> str:
        """The most common precision first."""
        return " + ".join(name for (_, name), _ in self._weights.get(role, Counter()).most_common())

    def _count(self, role: SlotRole, precision: _Precision, weights: int) -> None:
        if role != "vector":
            self._weights.setdefault(role, Counter())[precision] += weights


def _quantized(bits: int, group_size: int, columns: int) -> _Precision:
    if group_size < columns:
        return "quantized", f"int{bits} group {group_size}"
    return "quantized", f"int{bits}" if bits == 8 else f"int{bits} per output feature"
