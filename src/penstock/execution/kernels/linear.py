"""Linear layers in native code: weights packed once into the layout that the kernels read in order (csrc/abi.h), and their products.

A weight stays what it was: float32, bfloat16 and float16 without loss, int8 and int4 as codes with scales. Activations are float32. For
int8 and int4 weights a product quantises them on the way to int8, with one scale per row, or one per row and group of input features
where the weight's scales are grouped; linear_twin.py defines the arithmetic in plain torch. A row's result is bitwise the same whatever
other rows are computed with it and on however many threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.native import library, pointer
from penstock.execution.kernels.quantized import QuantizedTensor

WeightKind = Literal["float32", "bfloat16", "float16", "int8", "int4"]

# WeightKind in csrc/abi.h.
_KINDS: dict[WeightKind, int] = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
_FLOAT_KINDS: dict[torch.dtype, WeightKind] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_PANEL = 16  # output features
_STEP = 8  # K is padded to a multiple of this

# Sums of products of codes and one scale per output feature stay within int32: 255 * 127 * K < 2 ** 31.
_MAX_UNGROUPED_FEATURES = 66_000

MAX_SEGMENTS = 3


@dataclass(frozen=True)
class PackedWeight:
    """One weight [out_features, in_features] in the kernels' layout.

    data: float32, int16 (both 16-bit kinds) or uint8, one-dimensional, panels of 16 output features. group_size: input features that
    share a scale; in_features: one scale per output feature (and for float kinds, which have no scales). scales: float32 [N padded to
    16], or float16 [N / 16, K / group_size, 16] when grouped; offsets: float16 like grouped scales, or None when symmetric. input_order:
    int32 [K] or None; column k belongs to input feature input_order[k]. bias: float32 [N padded] or None.

    Tensors are contiguous; kernels are fastest when `data` starts at a multiple of 64 bytes.
    """

    kind: WeightKind
    out_features: int
    in_features: int
    group_size: int
    data: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None
    input_order: Tensor | None = None
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.data, self.scales, self.offsets, self.input_order, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_float(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """Pack a weight [N, K], float32, bfloat16 or float16, in its own type. Raises ModelFormatError for another type."""
    if weight.dtype not in _FLOAT_KINDS:
        raise ModelFormatError(f"weight: {weight.dtype} cannot be packed; convert it to float32, bfloat16 or float16.")
    rows, columns = weight.shape
    weight = _padded(weight)
    if weight.dtype == torch.bfloat16:
        data = _panels(weight.view(torch.int32)).view(torch.int16)
    elif weight.dtype == torch.float16:
        data = _panels(weight.view(torch.int16))
    else:
        data = _panels(weight)
    return PackedWeight(
        _FLOAT_KINDS[weight.dtype], rows, columns, columns, data.flatten(), bias=_padded_vector(bias, rows)
    )


def pack_quantized(weight: QuantizedTensor, bias: Tensor | None) -> PackedWeight:
    """Pack a quantised weight. Scales and offsets of groups are rounded to float16.

    Raises ModelFormatError when a scale is too large for float16, or when K is too long for one scale per output feature.
    """
    rows, columns = weight.shape
    weight = _regrouped(weight)
    grouped = weight.group_size < columns
    codes = _padded(weight.codes)
    if weight.bits == 4:
        codes = codes.view(len(codes), -1, 2, 4)
        codes = torch.add(codes[:, :, 0], codes[:, :, 1], alpha=16).view(len(codes), -1)
    offsets = None if weight.offsets is None else _grouped_parameters(weight.offsets, "offsets")
    return PackedWeight(
        kind="int4" if weight.bits == 4 else "int8",
        out_features=rows,
        in_features=columns,
        group_size=weight.group_size,
        data=_panels(codes.view(torch.int32)).view(torch.uint8).flatten(),
        scales=_grouped_parameters(weight.scales, "scales")
        if grouped
        else _padded_vector(weight.scales.flatten(), rows),
        offsets=offsets,
        input_order=None if weight.input_order is None else weight.input_order.to(torch.int32).contiguous(),
        bias=_padded_vector(bias, rows),
    )


class PackedWeightStruct(ctypes.Structure):
    """PackedWeight in csrc/abi.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("input_order", ctypes.c_void_p),
    ]


class LinearLayerStruct(ctypes.Structure):
    """LinearLayer in csrc/abi.h."""

    _fields_ = [
        ("segments", ctypes.c_int32),
        ("bf16_arithmetic", ctypes.c_int32),
        ("segment", PackedWeightStruct * MAX_SEGMENTS),
    ]


class NativeLinear:
    """A linear layer of one to three weights with the same input, whose outputs lie side by side.

    bf16_arithmetic: bfloat16 weights meet activations rounded to bfloat16, in the processor's bf16 units where it has them; otherwise
    activations stay float32. `struct` (LinearLayer in csrc/abi.h) points into the segments and lives as long as this object.
    """

    def __init__(self, segments: Sequence[PackedWeight], *, bf16_arithmetic: bool = False) -> None:
        if not 1 <= len(segments) <= MAX_SEGMENTS:
            raise ValueError(f"a linear layer has one to {MAX_SEGMENTS} segments, not {len(segments)}")
        if len({segment.in_features for segment in segments}) > 1:
            raise ValueError("segments of a linear layer share their input features")
        self.segments = tuple(segments)
        self.in_features = segments[0].in_features
        self.out_features = sum(segment.out_features for segment in segments)
        structs = (PackedWeightStruct * MAX_SEGMENTS)(*(_struct(segment) for segment in segments))
        self.struct = LinearLayerStruct(len(segments), int(bf16_arithmetic), structs)
        self._address = ctypes.addressof(self.struct)
        self._linear, self._dequantize = _functions()

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [M, K] → x @ weight.T + bias, float32 [M, sum of N]."""
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"expected float32 [M, {self.in_features}], got {x.dtype} {tuple(x.shape)}")
        if x.stride(1) != 1:
            x = x.contiguous()
        output = torch.empty(len(x), self.out_features, dtype=torch.float32)
        self._linear(self._address, x.data_ptr(), len(x), x.stride(0), output.data_ptr(), self.out_features, 0)
        return output

    def dequantize_rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, as for an embedding: ids int64 [T] in 0 … sum of N - 1 → float32 [T, K]. Raises IndexError."""
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise ValueError(f"expected int64 [T], got {ids.dtype} {tuple(ids.shape)}")
        output = torch.empty(len(ids), self.in_features, dtype=torch.float32)
        if len(ids) == 0:
            return output
        low, high = torch.aminmax(ids)
        if low < 0 or high >= self.out_features:
            raise IndexError(f"rows {int(low)} … {int(high)} asked for; the weight has {self.out_features}")
        ids = ids.contiguous()
        self._dequantize(self._address, ids.data_ptr(), len(ids), output.data_ptr())
        return output


@cache
def _functions() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    native = library()
    address, count = ctypes.c_void_p, ctypes.c_int64
    native.penstock_linear.argtypes = [address, address, count, count, address, count, ctypes.c_int32]
    native.penstock_linear.restype = None
    native.penstock_dequantize_rows.argtypes = [address, address, count, address]
    native.penstock_dequantize_rows.restype = None
    return native.penstock_linear, native.penstock_dequantize_rows


def _struct(weight: PackedWeight) -> PackedWeightStruct:
    return PackedWeightStruct(
        _KINDS[weight.kind],
        weight.group_size,
        weight.out_features,
        weight.in_features,
        pointer(weight.data),
        pointer(weight.scales),
        pointer(weight.offsets),
        pointer(weight.bias),
        pointer(weight.input_order),
    )


def _panels(weight: Tensor) -> Tensor:
    """[N, elements of K] → [N / 16, elements of K, 16]."""
    return weight.view(-1, _PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def _padded(weight: Tensor) -> Tensor:
    """A contiguous [N, K], padded with zeros to multiples of 16 and 8. Padding meets activations of zero or belongs to no output."""
    rows, columns = weight.shape
    more_rows, more_columns = -rows % _PANEL, -columns % _STEP
    if more_rows or more_columns:
        return F.pad(weight, (0, more_columns, 0, more_rows))
    return weight.contiguous()


def _padded_vector(vector: Tensor | None, rows: int) -> Tensor | None:
    if vector is None:
        return None
    return F.pad(vector.to(torch.float32), (0, -rows % _PANEL)).contiguous()


def _grouped_parameters(values: Tensor, name: str) -> Tensor:
    """float32 [N, groups] → float16 [N / 16, groups, 16]."""
    halves = F.pad(values, (0, 0, 0, -len(values) % _PANEL)).to(torch.float16)
    if not bool(torch.isfinite(halves).all()):
        raise ModelFormatError(f"{name}: quantised with values that float16 cannot hold; quantise the weight again.")
    return _panels(halves.view(torch.int16)).view(torch.float16)


def _regrouped(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight in a form that the kernels know: one scale per output feature is symmetric and not too long."""
    rows, columns = weight.shape
    if weight.group_size < columns or (weight.offsets is None and columns <= _MAX_UNGROUPED_FEATURES):
        return weight
    size = next((size for size in (128, 64, 32, 16) if columns % size == 0 and size < columns), None)
    if size is None:
        raise ModelFormatError(
            f"weight of {columns} input features with one scale each and {'offsets' if weight.offsets is not None else 'no groups'}: "
            "no group size divides it; quantise it symmetrically, or in groups."
        )
    shape = (rows, columns // size)
    scales = weight.scales.view(rows, 1).expand(shape)
    offsets = None if weight.offsets is None else weight.offsets.view(rows, 1).expand(shape)
    return QuantizedTensor(weight.codes, weight.bits, size, scales, offsets, weight.input_order)
