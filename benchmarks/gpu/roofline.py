"""How fast a GPU could be at most: bytes and operations of a step over what the card can move and multiply. Numbers only, no tensors.

    step = max(bytes / bandwidth, operations / peak) + kernels * launch         launch: one kernel of a CUDA graph, 0 to leave it out

A step that only decodes reads every weight of linear layers, norms and head once, and the keys and values of its requests. Scales of
whole rows are not counted: they are a thousandth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common import SHAPES

# Bytes per second and operations per second with which shared targets were computed; every table uses the card's own, measured ones.
NOMINAL_BANDWIDTH = 4.3e12
NOMINAL_PEAK = 790e12
# Seconds from one kernel of a CUDA graph to the next (published for an H100).
NOMINAL_LAUNCH = 1.3e-6
# Kernels of a step that belong to no layer: embedding, last norm, head, choice of the token.
KERNELS_OUTSIDE_LAYERS = 4
# Kernels of a layer when neighbours are fused as far as they can be without one kernel for a whole layer.
KERNELS_PER_LAYER = 7


@dataclass(frozen=True)
class Format:
    """Bytes of one weight, its share of the scales included: in linear layers and in the head."""

    name: str
    linear: float
    head: float


FORMATS = {
    format.name: format
    for format in (
        Format("bf16", 2.0, 2.0),
        Format("int8", 1.0, 1.0),
        Format("fp8", 1.0, 1.0),
        Format("int8, head bf16", 1.0, 2.0),
        Format("int4 g128, head bf16", 0.5 + 2 / 128, 2.0),
        Format("int4 g128, head int8", 0.5 + 2 / 128, 1.0),
        Format("int4 g32 with zeros, head bf16", 0.5 + 4 / 32, 2.0),
    )
}


@dataclass(frozen=True)
class Sizes:
    """What a config.json says about the size of a step. linear: weights of all linear layers; head: weights of the output head; norms:
    numbers in all norms; kv_width: numbers of a key, or of a value, of one token in one layer."""

    layers: int
    hidden: int
    head_dim: int
    query_width: int
    kv_width: int
    linear: int
    head: int
    norms: int

    @classmethod
    def read(cls, shape: str) -> Sizes:
        """Of a folder of benchmarks/shapes."""
        return cls.of(json.loads((SHAPES / shape / "config.json").read_text()))

    @classmethod
    def of(cls, config: dict[str, int]) -> Sizes:
        """Of a Llama, Qwen2 or Qwen3 config.json."""
        hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
        head_dim = config.get("head_dim") or hidden // heads
        query_width, kv_width = heads * head_dim, config["num_key_value_heads"] * head_dim
        per_layer = hidden * (2 * query_width + 2 * kv_width) + 3 * hidden * config["intermediate_size"]
        return cls(
            layers=layers,
            hidden=hidden,
            head_dim=head_dim,
            query_width=query_width,
            kv_width=kv_width,
            linear=layers * per_layer,
            head=config["vocab_size"] * hidden,
            norms=(2 * layers + 1) * hidden,
        )

    def weight_bytes(self, weights: Format) -> float:
        """Bytes of weights that a step reads."""
        return self.linear * weights.linear + self.head * weights.head + 2 * self.norms

    def kv_bytes_per_token(self, bytes_per_number: float = 2.0) -> float:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_width * bytes_per_number

    def kernels(self, per_layer: int = KERNELS_PER_LAYER) -> int:
        """Kernels that a step launches."""
        return per_layer * self.layers + KERNELS_OUTSIDE_LAYERS


@dataclass(frozen=True)
class Card:
    """What a card can do per second, and seconds per kernel in a CUDA graph (0: not counted)."""

    bandwidth: float = NOMINAL_BANDWIDTH
    peak: float = NOMINAL_PEAK
    launch: float = 0.0


def step_bytes(sizes: Sizes, weights: Format, requests: int, context: float, kv_bytes: float = 2.0) -> float:
    """Bytes that a step moves which decodes one token for each of `requests`; context: tokens before it, kv_bytes: of one number."""
    return sizes.weight_bytes(weights) + requests * context * sizes.kv_bytes_per_token(kv_bytes)


def step_seconds(
    sizes: Sizes, weights: Format, requests: int, context: float, card: Card, *, kv_bytes: float = 2.0
) -> float:
    """The least time of such a step."""
    operations = 2.0 * (sizes.linear + sizes.head) * requests
    operations += 4 * requests * context * sizes.query_width * sizes.layers
    moved = step_bytes(sizes, weights, requests, context, kv_bytes) / card.bandwidth
    return max(moved, operations / card.peak) + sizes.kernels() * card.launch


def decode_rate(
    sizes: Sizes, weights: Format, requests: int, context: float, card: Card, *, kv_bytes: float = 2.0
) -> float:
    """Output tokens per second at most."""
    return requests / step_seconds(sizes, weights, requests, context, card, kv_bytes=kv_bytes)


def prefill_seconds(sizes: Sizes, tokens: int, card: Card) -> float:
    """The least time of one prompt: products of the linear layers and of causal attention, the head left out."""
    attention = 4 * tokens * (tokens / 2) * sizes.query_width * sizes.layers
    return (2 * sizes.linear * tokens + attention) / card.peak


def workload_seconds(
    sizes: Sizes, weights: Format, prompts: Sequence[int], outputs: Sequence[int], card: Card, *, kv_bytes: float = 2.0
) -> float:
    """The least time of requests that all start together and run in one batch: keys and values of every step, weights once per step of the
    longest output, and the products of the prompts."""
    reads = sum(length * prompt + length * length / 2 for prompt, length in zip(prompts, outputs, strict=True))
    moved = reads * sizes.kv_bytes_per_token(kv_bytes) + max(outputs) * sizes.weight_bytes(weights)
    kernels = max(outputs) * sizes.kernels() * card.launch
    return moved / card.bandwidth + 2 * sizes.linear * sum(prompts) / card.peak + kernels
