"""What a GGUF file holds: types of tensors, places of tensors, and metadata with typed access. `core.gguf` reads it from a file."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from penstock.core.errors import ModelFormatError

# Numbers of an array stay packed; texts are a list.
Value = int | float | bool | str | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True, slots=True)
class TensorType:
    """How numbers are stored: blocks of `block_values` numbers in `block_bytes` bytes."""

    name: str
    block_values: int
    block_bytes: int


# ggml_type number → layout. Numbers that are missing were removed from the format.
TENSOR_TYPES: Mapping[int, TensorType] = {
    number: TensorType(name, block_values, block_bytes)
    for number, name, block_values, block_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` has the slowest dimension first, [N, K] for a linear weight; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A file's metadata and tensors, in the file's order. `header_bytes`: where the table ends. `size`: of the file, in bytes."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor] = field(repr=False)
    header_bytes: int
    size: int

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self.path}: {key}: {problem}.")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 0) -> int:
        """Raises ModelFormatError when it is missing without a default, no integer, or not from `minimum` to 2**31 - 1."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"must be an integer, not {shortened(value)}")
        if not minimum <= value < 2**31:
            self.fail(key, f"must be between {minimum} and {2**31 - 1}, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises ModelFormatError."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(key, f"must be a finite number, not {shortened(value)}")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Raises ModelFormatError."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {shortened(value)}")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Raises ModelFormatError."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self.fail(key, f"must be a string, not {shortened(value)}")
        return value

    def strings(self, key: str, default: Sequence[str] | None = None) -> list[str]:
        """A list of strings. Raises ModelFormatError."""
        value = self._value(key, default)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, f"must be an array of strings, not {shortened(value)}")
        return value

    def numbers(self, key: str) -> Sequence[float]:
        """An array of numbers. Raises ModelFormatError."""
        value = self._value(key, None)
        if not isinstance(value, array):
            self.fail(key, f"must be an array of numbers, not {shortened(value)}")
        return value

    def integers(self, key: str) -> list[int]:
        """An array of integers. Raises ModelFormatError."""
        value = self._value(key, None)
        if not isinstance(value, array) or value.typecode in "fd":
            self.fail(key, f"must be an array of integers, not {shortened(value)}")
        return value.tolist()

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            self.fail(key, "is missing from the metadata; convert the model again with a current llama.cpp")
        return value


def shortened(value: object) -> str:
    """`value` for a message, cut to 60 characters; of an array, which may be huge, the length only."""
    if isinstance(value, list | array):
        return f"an array of {len(value)}"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."
