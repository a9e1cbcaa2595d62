"""Cases of `penstock bench kernels`: linear layers in the shapes of two models, beside torch's operator for the same weight."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.kernels.linear import NativeLinear, PackedWeight, pack_float, pack_quantized
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.measurement.timing import Arithmetic, Case, Run, copies_needed, rotation

# Layer → (output features, input features).
MODELS = {
    "tinyllama-1.1b": {
        "qkv": (2560, 2048),
        "o": (2048, 2048),
        "gate_up": (11264, 2048),
        "down": (2048, 5632),
        "head": (32000, 2048),
    },
    "qwen2.5-0.5b": {
        "qkv": (1152, 896),
        "o": (896, 896),
        "gate_up": (9728, 896),
        "down": (896, 4864),
        "head": (151936, 896),
    },
}
KINDS = ("int8", "int4 g128", "int4 g32", "bfloat16", "float32")
TOKENS = (1, 8, 32, 128, 512)
# The head is computed for the last token of each request only.
MOST_HEAD_ROWS = 32


def linear_cases(
    model: str, kind: str, tokens: Sequence[int], *, bf16_arithmetic: bool, layers: Sequence[str] | None = None
) -> Iterator[Case]:
    """Every layer of a model with every number of tokens. Memory of a layer is released when the next one is asked for.

    bf16_arithmetic: bfloat16 weights meet activations in bfloat16.
    """
    for layer, (out_features, in_features) in MODELS[model].items():
        if layers is None or layer in layers:
            counts = [count for count in tokens if layer != "head" or count <= MOST_HEAD_ROWS]
            yield from _layer_cases(
                f"{layer} {out_features}x{in_features}", kind, counts, (out_features, in_features), bf16_arithmetic
            )


def _layer_cases(
    name: str, kind: str, tokens: Sequence[int], size: tuple[int, int], bf16_arithmetic: bool
) -> Iterator[Case]:
    out_features, in_features = size
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(size).normal_(0, 0.02, generator=generator)
    layers = _native_layers(_pack(weight, kind), bf16_arithmetic)
    reference = _Reference(weight, kind)
    del weight
    nbytes = layers[0].nbytes
    arithmetic = _arithmetic(kind, bf16_arithmetic)
    for count in tokens:
        x = torch.empty(count, in_features).normal_(generator=generator)
        yield Case(
            kernel=f"linear {kind}",
            shape=name,
            rows=count,
            bytes_read=nbytes + 4.0 * x.numel(),
            operations=2.0 * count * out_features * in_features,
            arithmetic=arithmetic,
            run=_rotating(layers, x),
            reference=reference.run(x),
            reference_name=reference.name,
        )


def _arithmetic(kind: str, bf16_arithmetic: bool) -> Arithmetic:
    if kind.startswith("int"):
        return "int8"
    return "bfloat16" if kind == "bfloat16" and bf16_arithmetic else "float32"


def _pack(weight: Tensor, kind: str) -> PackedWeight:
    """A weight [N, K] rounded to the nearest of what `kind` can hold."""
    if not kind.startswith("int"):
        return pack_float(weight.to(getattr(torch, kind)), None)
    bits = 8 if kind == "int8" else 4
    group = weight.shape[1] if kind == "int8" else int(kind.partition(" g")[2])
    return pack_quantized(round_to_nearest(weight, bits, group), None)


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> QuantizedTensor:
    """The plainest symmetric quantisation of float32 [N, K]: the largest magnitude of a group is its largest code."""
    zero = 1 << (bits - 1)
    groups = weight.view(weight.shape[0], -1, group_size)
    scales = groups.abs().amax(-1).clamp_min(1e-8) / (zero - 1)
    codes = (groups / scales.unsqueeze(-1)).round_().add_(zero).to(torch.uint8).view(weight.shape)
    return QuantizedTensor(codes, bits, group_size, scales)


def _native_layers(packed: PackedWeight, bf16_arithmetic: bool) -> list[NativeLinear]:
    copies = [packed]
    for _ in range(copies_needed(packed.nbytes) - 1):
        scales = None if packed.scales is None else packed.scales.clone()
        copies.append(dataclasses.replace(packed, data=packed.data.clone(), scales=scales))
    return [NativeLinear([copy], bf16_arithmetic=bf16_arithmetic) for copy in copies]


def _rotating(layers: Sequence[NativeLinear], x: Tensor) -> Run:
    turn = rotation(layers)
    return lambda: next(turn)(x)


class _Reference:
    """torch's operator for a weight of a kind, on copies that no cache holds. `name`: which one it is."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        self._kind = kind
        match kind:
            case "int8":
                self.name = "quantized.linear_dynamic"
                self._weights = [_dynamic_int8(weight) for _ in range(copies_needed(weight.numel()))]
            case "int4 g128" | "int4 g32":
                self.name = "_weight_int4pack_mm (bf16)"
                group = int(kind.partition(" g")[2])
                packed = _packed_int4(weight, group)
                self._weights = [
                    (packed[0].clone(), group, packed[1]) for _ in range(copies_needed(weight.numel() // 2))
                ]
            case _:
                self.name = f"F.linear ({'bf16' if kind == 'bfloat16' else 'fp32'})"
                stored = weight.to(getattr(torch, kind))
                self._weights = [stored.clone() for _ in range(copies_needed(stored.nbytes))]

    def run(self, x: Tensor) -> Run:
        """The operator on activations [M, K] in the type that it takes."""
        turn = rotation(cast("Sequence[object]", self._weights))
        match self._kind:
            case "int8":
                return lambda: torch.ops.quantized.linear_dynamic(x, next(turn))
            case "int4 g128" | "int4 g32":
                half = x.to(torch.bfloat16)
                return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, *cast("tuple[object, ...]", next(turn)))
            case _:
                typed = x.to(getattr(torch, self._kind))
                return lambda: F.linear(typed, cast("Tensor", next(turn)))


def _dynamic_int8(weight: Tensor) -> object:
    """A weight packed for torch's dynamically quantised product."""
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # Deprecated, and still torch's fastest int8 product on a CPU.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _packed_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and bfloat16 (scale, zero) pairs [K / group, N, 2] as torch's int4 product for CPUs takes them."""
    rounded = round_to_nearest(weight, 4, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.codes.to(torch.int32), 1)
    pairs = torch.stack([rounded.scales.T, torch.zeros_like(rounded.scales.T)], dim=-1)
    return packed, pairs.to(torch.bfloat16).contiguous()
