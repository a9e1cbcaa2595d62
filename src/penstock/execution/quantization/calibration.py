"""What quantisation has to know about a model's activations: windows of calibration text run through one layer at a time.

A decoder layer here is a dictionary of float32 tensors under their names in the checkpoint, without the prefix "model.layers.N.". The
forward pass is the plain one of Llama, Mistral, Qwen2 and Qwen3, which differ in what tensors they have: biases where there is a
".bias", normalised heads where there is a "q_norm.weight". Only one layer's weights are in memory at a time, and of the activations only
what flows from one layer into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.quantization.awq_search import InputStatistics

# The products of a layer that have one input, by the name of that input.
INPUT_GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LINEAR_NAMES = tuple(name for names in INPUT_GROUPS.values() for name in names)

LayerWeights = dict[str, Tensor]

# Called with the name of an input group and its input, float32 [T, K].
Observer = Callable[[str, Tensor], None]

# Positions int64 [T] → cosines and sines, each [T, 1, D], the sines of the first half negated.
Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]


class DecoderShape(Protocol):
    """What the forward pass needs to know of a model's configuration."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def sliding_windows(self) -> tuple[int | None, ...]: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class LayerRunner:
    """Runs decoder layers."""

    shape: DecoderShape
    rotary: Rotary

    def run(
        self,
        index: int,
        weights: LayerWeights,
        hidden: Tensor,
        *,
        round_inputs: Callable[[Tensor], Tensor] | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Layer `index` on one window: residual stream float32 [T, hidden_size] → the next one. round_inputs: what is done to the input
        [T, K] of every product."""
        eps = self.shape.rms_norm_eps

        def linear(group: str, x: Tensor) -> list[Tensor]:
            if observe is not None:
                observe(group, x)
            if round_inputs is not None:
                x = round_inputs(x)
            return [F.linear(x, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in INPUT_GROUPS[group]]

        query, key, value = linear("qkv", rms_norm(hidden, weights["input_layernorm.weight"], eps))
        (attended,) = linear("o", self._attend(index, weights, query, key, value))
        hidden = hidden + attended
        gate, up = linear("gate_up", rms_norm(hidden, weights["post_attention_layernorm.weight"], eps))
        (output,) = linear("down", F.silu(gate).mul_(up))
        return hidden + output

    def _attend(self, index: int, weights: LayerWeights, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Projections [T, heads * D] → [T, H * D], causal, within the layer's sliding window."""
        shape, length = self.shape, query.shape[0]
        queries = query.view(length, shape.num_heads, shape.head_dim)
        keys, values = (x.view(length, shape.num_kv_heads, shape.head_dim) for x in (key, value))
        if "self_attn.q_norm.weight" in weights:
            queries = rms_norm(queries, weights["self_attn.q_norm.weight"], shape.rms_norm_eps)
            keys = rms_norm(keys, weights["self_attn.k_norm.weight"], shape.rms_norm_eps)
        cosines, sines = self.rotary(torch.arange(length))
        half = shape.head_dim // 2
        queries, keys = (x * cosines + x.roll(half, dims=-1) * sines for x in (queries, keys))
        repeats = shape.num_heads // shape.num_kv_heads
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
        mask = causal_mask(length, shape.sliding_windows[index])
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (queries, keys, values))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return attended.squeeze(0).transpose(0, 1).flatten(1)


def causal_mask(length: int, window: int | None) -> Tensor:
    """bool [length, length]: whether a token (row) sees another: itself and those before it, at most `window` in all."""
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    return sees if window is None else sees.triu(1 - window)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def round_activations(x: Tensor, bits: int) -> Tensor:
    """x [T, K] as it is after symmetric rounding to `bits`, a scale per token."""
    largest_code = (1 << (bits - 1)) - 1
    scales = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / largest_code
    return (x / scales).round_().mul_(scales)


def collect_statistics(
    runner: LayerRunner, index: int, weights: LayerWeights, streams: Iterable[Tensor]
) -> dict[str, InputStatistics]:
    """Statistics of every input group of layer `index`, over residual streams [T, hidden_size]; the streams are not changed.

    Sums are in float32 and grow window by window, so a window's share of rounding stays small.
    """
    moments: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def observe(group: str, x: Tensor) -> None:
        if group not in moments:
            moments[group] = torch.zeros(x.shape[1], x.shape[1])
            magnitudes[group] = torch.zeros(x.shape[1])
            tokens[group] = 0
        moments[group].addmm_(x.T, x)
        magnitudes[group] += x.abs().sum(0)
        tokens[group] += x.shape[0]

    for hidden in streams:
        runner.run(index, weights, hidden, observe=observe)
    return {
        group: InputStatistics(moments[group].div_(count), magnitudes[group].div_(count))
        for group, count in tokens.items()
    }


def split_windows(documents: Sequence[Sequence[int]], window: int, limit: int | None = None) -> list[list[int]]:
    """Documents (token ids) cut into windows of at most `window` tokens, none across two documents, at most `limit` tokens in all.

    Windows of a single token say nothing about what follows it and are left out.
    """
    windows: list[list[int]] = []
    room = limit
    for document in documents:
        for start in range(0, len(document), window):
            piece = list(document[start : start + window])
            if room is not None:
                piece = piece[:room]
                room -= len(piece)
            if len(piece) > 1:
                windows.append(piece)
            if room is not None and room <= 0:
                return windows
    return windows
