"""The floor under each figure of the CPU comparison: bytes and operations of a step over what the machine can move and multiply.

    python benchmarks/cpu/budget.py --bandwidth 60 --vnni 1900 --fma 480 [--shape tinyllama-1.1b]

Bandwidth in GB/s, peaks in GOPS and GFLOPS (`penstock bench ceilings` prints them). A step that only decodes reads every weight and the
KV cache of its requests once and multiplies each weight with every row; it can be no faster than the slower of the two, plus the Python
microseconds that nothing hides. Prefill multiplies far more than it reads.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

SHAPES = Path(__file__).resolve().parents[1] / "shapes"

# Bytes per weight: int4 counts a float16 scale per group; the head of an int4 model is int8.
BYTES = {"int8": 1.0, "int4 g128": 0.5 + 2 / 128, "bf16": 2.0, "fp32": 4.0}
# Python's share of a step in seconds that this project allows itself, by requests in the step.
PYTHON_SECONDS = {1: 0.5e-3, 8: 0.7e-3, 32: 1.2e-3}
KV_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """What a config.json says about the size of a step. linear, head: numbers of weights."""

    layers: int
    query_width: int
    kv_width: int
    linear: int
    head: int

    @classmethod
    def read(cls, name: str) -> Shape:
        config = json.loads((SHAPES / name / "config.json").read_text())
        hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_width = config["num_key_value_heads"] * head_dim
        query_width = heads * head_dim
        per_layer = hidden * (2 * query_width + 2 * kv_width) + 3 * hidden * config["intermediate_size"]
        return cls(layers, query_width, kv_width, layers * per_layer, config["vocab_size"] * hidden)

    def weight_bytes(self, kind: str) -> float:
        """Bytes that a step reads of linear layers and head."""
        return self.linear * BYTES[kind] + self.head * max(BYTES[kind], 1.0)

    def kv_bytes(self, context: float) -> float:
        """Bytes of keys and values of one request."""
        return context * self.layers * 2 * self.kv_width * KV_BYTES

    def attention_flops(self, tokens: float, context: float) -> float:
        return 4 * tokens * context * self.query_width * self.layers


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second."""

    bandwidth: float
    integer: float
    floating: float

    def peak(self, kind: str) -> float:
        return self.integer if kind.startswith("int") else self.floating


def decode_seconds(shape: Shape, kind: str, requests: int, context: float, ceilings: Ceilings) -> tuple[float, float]:
    """(time to move, time to multiply) of one step that decodes one token for each of `requests`."""
    moved = shape.weight_bytes(kind) + requests * shape.kv_bytes(context)
    multiply = 2 * (shape.linear + shape.head) * requests / ceilings.peak(kind)
    attend = requests * shape.attention_flops(1, context) / ceilings.floating
    return moved / ceilings.bandwidth, multiply + attend


def prefill_seconds(shape: Shape, kind: str, tokens: int, requests: int, ceilings: Ceilings) -> float:
    """Prompts of `tokens` each: all products, and the head once per prompt."""
    products = 2 * (shape.linear * tokens + shape.head) * requests / ceilings.peak(kind)
    return products + requests * shape.attention_flops(tokens, tokens / 2) / ceilings.floating


def served_seconds(shape: Shape, kind: str, requests: int, prompt: int, output: int, ceilings: Ceilings) -> float:
    """A closed batch: prefill of all, then output - 1 steps of all."""
    step = max(decode_seconds(shape, kind, requests, prompt + output / 2, ceilings)) + PYTHON_SECONDS[requests]
    return prefill_seconds(shape, kind, prompt, requests, ceilings) + (output - 1) * step


def table(name: str, ceilings: Ceilings) -> str:
    """The budget of one shape as Markdown."""
    shape = Shape.read(name)
    lines = [
        f"**{name}**: {shape.linear / 1e6:,.0f} M weights in linear layers, {shape.head / 1e6:,.0f} M in the head, "
        f"{shape.kv_bytes(1) / 1024:.0f} KiB of float32 KV cache per token",
        "",
        "| row | weights MB | KV MB | GOP | move ms | multiply ms | Python ms | floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in BYTES:
        move, multiply = decode_seconds(shape, kind, 1, 256, ceilings)
        floor = max(move, multiply) + PYTHON_SECONDS[1]
        lines.append(
            f"| decode, batch 1, {kind} | {shape.weight_bytes(kind) / 1e6:,.0f} | {shape.kv_bytes(256) / 1e6:.0f} "
            f"| {2 * (shape.linear + shape.head) / 1e9:.1f} | {move * 1e3:.1f} | {multiply * 1e3:.1f} "
            f"| {PYTHON_SECONDS[1] * 1e3:.1f} | {1 / floor:.1f} tok/s |"
        )
    for kind in BYTES:
        seconds = prefill_seconds(shape, kind, 512, 1, ceilings)
        operations = 2 * (shape.linear * 512 + shape.head) / 1e9
        lines.append(
            f"| prefill 512, {kind} | {shape.weight_bytes(kind) / 1e6:,.0f} | {shape.kv_bytes(512) / 1e6:.0f} | {operations:,.0f} "
            f"| {shape.weight_bytes(kind) / ceilings.bandwidth * 1e3:.0f} | {seconds * 1e3:.0f} | {PYTHON_SECONDS[1] * 1e3:.1f} "
            f"| {512 / seconds:.0f} tok/s |"
        )
    for requests, prompt, output in ((8, 128, 128), (32, 64, 64)):
        for kind in ("int8", "int4 g128"):
            move, multiply = decode_seconds(shape, kind, requests, prompt + output / 2, ceilings)
            total = served_seconds(shape, kind, requests, prompt, output, ceilings)
            lines.append(
                f"| {requests} requests, {prompt} in / {output} out, {kind}: a decode step | {shape.weight_bytes(kind) / 1e6:,.0f} "
                f"| {requests * shape.kv_bytes(prompt + output / 2) / 1e6:.0f} | {2 * (shape.linear + shape.head) * requests / 1e9:.0f} "
                f"| {move * 1e3:.1f} | {multiply * 1e3:.1f} | {PYTHON_SECONDS[requests] * 1e3:.1f} "
                f"| {requests * output / total:.0f} tok/s with prefill |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s read by all threads")
    parser.add_argument("--vnni", type=float, required=True, help="GOPS of u8*s8 products on all threads")
    parser.add_argument("--fma", type=float, required=True, help="GFLOPS of float32 products on all threads")
    parser.add_argument("--shape", action="append", choices=sorted(path.name for path in SHAPES.iterdir()))
    arguments = parser.parse_args()
    ceilings = Ceilings(arguments.bandwidth * 1e9, arguments.vnni * 1e9, arguments.fma * 1e9)
    print("\n\n".join(table(name, ceilings) for name in arguments.shape or ["tinyllama-1.1b", "qwen2.5-0.5b"]))


if __name__ == "__main__":
    main()
