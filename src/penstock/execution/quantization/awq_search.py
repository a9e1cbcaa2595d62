"""Choosing scales: per group by trying how far the range is shrunk, and per input feature by what the activations say (AWQ).

AWQ (Lin et al., 2023, arXiv:2306.00978) multiplies input feature k of a weight by s[k] and divides whatever produces that feature by the
same number. The product stays what it was, but features that matter are rounded with a finer step.

The loss everywhere is the mean squared error of the layer's output. With C = E[x xᵀ], the second moment of its inputs,

    E |(Q(W) - W) x|²  =  sum of ((Q(W) - W) C) * (Q(W) - W)

so the inputs themselves need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import QuantizedTensor

# Shares of the largest magnitude that the largest code stands for. Rounding the rest more finely outweighs clipping a few.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(21))

# Enough to rank the exponents of AWQ, which are then followed by a full search.
_COARSE_SHRINKS = (1.0, 0.9, 0.8)

# Exponents of the activations' magnitude, 0 (no scaling) to 1.
_EXPONENTS = tuple(step / 20 for step in range(20))

# Output features per weight that rank the exponents; evenly spaced rows of larger weights are enough.
_SAMPLED_ROWS = 1024

# Loss of rounding errors [N, G, g] → [N, G].
GroupLoss = Callable[[Tensor], Tensor]


def squared_error(errors: Tensor) -> Tensor:
    """The loss that knows nothing about the inputs: all matter equally."""
    return errors.square().sum(-1)


def moment_loss(moment: Tensor, group_size: int) -> GroupLoss:
    """The loss by the second moment [K, K] of the inputs, each group by itself."""
    groups = moment.shape[0] // group_size
    starts = torch.arange(groups)
    blocks = moment.view(groups, group_size, groups, group_size)[starts, :, starts, :]  # [G, g, g]

    def loss(errors: Tensor) -> Tensor:
        by_group = errors.transpose(0, 1)  # [G, N, g]
        return (torch.bmm(by_group, blocks) * by_group).sum(-1).T

    return loss


def search_scales(
    weight: Tensor, bits: int, scale_dtype: torch.dtype, loss: GroupLoss, shrinks: Sequence[float] = SHRINKS
) -> Tensor:
    """The best scale of each group among `shrinks` of its range: weight float32 [N, G, g] → float32 [N, G].

    Scales are such as `scale_dtype`, the type they are stored in, can hold exactly, so that codes are chosen for the numbers that a
    reader of the file computes with.
    """
    largest_code = (1 << (bits - 1)) - 1
    widest = weight.abs().amax(-1) / largest_code
    best_loss = torch.full_like(widest, torch.inf)
    best = torch.ones_like(widest)
    for shrink in shrinks:
        scales = storable_scales(widest * shrink, scale_dtype)
        error = loss(round_to_codes(weight, scales, bits).sub_(1 << (bits - 1)).mul_(scales.unsqueeze(-1)).sub_(weight))
        better = error < best_loss
        best_loss = torch.where(better, error, best_loss)
        best = torch.where(better, scales, best)
    return best


def storable_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` as `dtype` holds them, in float32; a group of zeros gets 1, which is never divided away."""
    stored = scales.to(dtype).to(torch.float32)
    return torch.where(stored > 0, stored, 1.0)


def round_to_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Unsigned codes, as float32, of [..., g] with scales [...]; the zero is at 2 ** (bits - 1)."""
    zero = 1 << (bits - 1)
    return (weight / scales.unsqueeze(-1)).round_().add_(zero).clamp_(0, 2 * zero - 1)


def round_weight(
    weight: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    loss: GroupLoss = squared_error,
    shrinks: Sequence[float] = SHRINKS,
) -> QuantizedTensor:
    """Round float32 [N, K] to the nearest codes, with a symmetric scale per `group_size` input features (which divides K)."""
    groups = weight.view(weight.shape[0], -1, group_size)
    scales = search_scales(groups, bits, scale_dtype, loss, shrinks)
    codes = round_to_codes(groups, scales, bits).to(torch.uint8).flatten(1)
    return QuantizedTensor(codes=codes, bits=bits, group_size=group_size, scales=scales)


@dataclass(frozen=True)
class InputStatistics:
    """What is kept of a layer's inputs x: moment, float32 [K, K], the mean of x xᵀ; magnitude, float32 [K], the mean of |x|."""

    moment: Tensor
    magnitude: Tensor

    def divided_by(self, scales: Tensor) -> InputStatistics:
        """Those of x / scales, for scales [K]."""
        return InputStatistics(self.moment / (scales.unsqueeze(0) * scales.unsqueeze(1)), self.magnitude / scales)


def search_input_scales(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    shared_by: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """AWQ's scales [K] for `weights` (float32 [N, K] each) that share one input: magnitude ** a with the best exponent a.

    `shared_by` turns magnitudes [K] into magnitudes [K] that are equal where features cannot be scaled apart.
    Returns ones when no scaling is better.
    """
    magnitude = statistics.magnitude if shared_by is None else shared_by(statistics.magnitude)
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max().clamp(min=1e-8)))
    samples = [weight[:: max(1, weight.shape[0] // _SAMPLED_ROWS)] for weight in weights]
    best, best_loss = torch.ones_like(magnitude), torch.inf
    for exponent in _EXPONENTS:
        scales = magnitude**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = statistics.divided_by(scales)
        loss = moment_loss(scaled.moment, group_size)
        total = 0.0
        for sample in samples:
            stretched = sample * scales
            rounded = round_weight(stretched, bits, group_size, scale_dtype, loss, _COARSE_SHRINKS)
            error = rounded.dequantize().sub_(stretched)
            total += float(((error @ scaled.moment) * error).sum())
        if total < best_loss:
            best, best_loss = scales, total
    return best


def balance_layer(
    weights: dict[str, Tensor],
    statistics: dict[str, InputStatistics],
    dtypes: Mapping[str, torch.dtype],
    *,
    bits: int,
    group_size: int,
    head_dim: int,
) -> None:
    """Scale the inputs of all products of a decoder layer, in place; the layer's output stays the same but for rounding.

    weights: float32 by name within the layer; dtypes: the types that they are stored in; statistics: by input group, see
    calibration.INPUT_GROUPS. What is divided is the norm before query, key and value, and the one before gate and up; the value projection
    before the output projection (per key-value head, so that the query heads that share it agree); up before down.
    """

    def scale(group: str, names: Sequence[str], shared_by: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        linears = [weights[f"{name}.weight"] for name in names]
        scale_dtype = dtypes[f"{names[0]}.weight"]
        return search_input_scales(
            linears,
            statistics[group],
            bits=bits,
            group_size=group_size,
            scale_dtype=scale_dtype,
            shared_by=shared_by,
        )

    def multiply_inputs(group: str, names: Sequence[str], scales: Tensor) -> None:
        for name in names:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * scales
        statistics[group] = statistics[group].divided_by(scales)

    def divide_outputs(name: str, scales: Tensor) -> None:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] / scales.unsqueeze(1)
        if f"{name}.bias" in weights:
            weights[f"{name}.bias"] = _as_stored(weights[f"{name}.bias"] / scales, dtypes[f"{name}.bias"])

    for group, norm, names in (
        ("qkv", "input_layernorm.weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("gate_up", "post_attention_layernorm.weight", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        before = weights[norm]
        weights[norm] = _as_stored(before / scale(group, names), dtypes[norm])
        # The scales that the rounded norm really divides by, so that rounding it costs nothing.
        exact = torch.where(weights[norm] != 0, before / weights[norm], 1.0)
        multiply_inputs(group, names, exact)

    value_heads = weights["self_attn.v_proj.weight"].shape[0] // head_dim

    def mean_over_sharing_heads(magnitude: Tensor) -> Tensor:
        by_head = magnitude.view(value_heads, -1, head_dim)
        return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()

    scales = scale("o", ("self_attn.o_proj",), mean_over_sharing_heads)
    divide_outputs("self_attn.v_proj", scales.view(value_heads, -1, head_dim)[:, 0].flatten())
    multiply_inputs("o", ("self_attn.o_proj",), scales)
    scales = scale("down", ("mlp.down_proj",))
    divide_outputs("mlp.up_proj", scales)
    multiply_inputs("down", ("mlp.down_proj",), scales)


def _as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x, rounded to what `dtype` can hold."""
    return x.to(dtype).to(torch.float32)
