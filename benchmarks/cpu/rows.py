"""The rows of the comparison: what is asked of an engine, and what the machine would allow.

Every figure comes from the same operation, "complete these prompts greedily to exactly n tokens, and say how long it took", so that no
engine is timed inside itself:

    decode     one request: tokens 2 … n of a short prompt: (n - 1) / (time for n tokens - time for 1 token)
    prefill    one request: prompt tokens / time for 1 token
    served     all requests at once: output tokens / time, prefill included
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.cpu.budget import Ceilings, Shape, decode_seconds, prefill_seconds

Kind = Literal["decode", "prefill", "served"]
Generate = Callable[[list[list[int]], int], float]
TOKEN_RANGE = range(300, 31_000)


@dataclass(frozen=True)
class Row:
    """One figure in output or prompt tokens per second. `precisions`: those in which it is measured."""

    key: str
    title: str
    kind: Kind
    requests: int
    prompt: int
    output: int
    precisions: tuple[str, ...]

    def tokens(self) -> int:
        """Tokens that the KV cache holds in the end."""
        return self.requests * (self.prompt + self.output)

    def measure(self, generate: Generate, seed: str) -> float:
        """Tokens per second; `generate` completes prompts and returns seconds. Equal seeds ask the same."""
        rng = random.Random(seed)
        prompts = [rng.choices(TOKEN_RANGE, k=self.prompt) for _ in range(self.requests)]
        if self.kind == "prefill":
            return self.prompt / generate(prompts, 1)
        if self.kind == "served":
            return self.requests * self.output / generate(prompts, self.output)
        first = generate([rng.choices(TOKEN_RANGE, k=self.prompt)], 1)
        return (self.output - 1) / (generate(prompts, self.output) - first)

    def ceiling(self, shape: Shape, precision: str, ceilings: Ceilings) -> float:
        """Tokens per second if memory or arithmetic alone, whichever is slower, took time."""
        if self.kind == "prefill":
            return self.prompt / prefill_seconds(shape, precision, self.prompt, 1, ceilings)
        step = max(decode_seconds(shape, precision, self.requests, self.prompt + self.output / 2, ceilings))
        if self.kind == "decode":
            return 1 / step
        start = prefill_seconds(shape, precision, self.prompt, self.requests, ceilings)
        return self.requests * self.output / (start + (self.output - 1) * step)


ALL = ("int8", "int4 g128", "bf16", "fp32")
QUANTISED = ("int8", "int4 g128")
ROWS = (
    Row("decode", "decode, 1 request", "decode", 1, 32, 65, ALL),
    Row("prefill", "prefill, 512 tokens", "prefill", 1, 512, 1, ALL),
    Row("served-8", "8 requests, 128 in / 128 out", "served", 8, 128, 128, QUANTISED),
    Row("served-32", "32 requests, 64 in / 64 out", "served", 32, 64, 64, QUANTISED),
)
QUICK_ROWS = (
    Row("decode", "decode, 1 request", "decode", 1, 16, 17, ALL),
    Row("prefill", "prefill, 128 tokens", "prefill", 1, 128, 1, ALL),
    Row("served-8", "8 requests, 16 in / 8 out", "served", 8, 16, 8, QUANTISED),
)


def machine_ceilings(measured: dict[str, Any], precision: str) -> Ceilings:
    """From the JSON of `penstock bench ceilings`: all threads, with the fastest arithmetic that the precision can use."""
    peaks = measured["all_threads"]
    floating = peaks["float32_gflops"]
    if precision == "bf16":
        floating = max(floating, peaks["bfloat16_gflops"] or 0.0)
    integer = peaks["int8_gops"] or floating
    return Ceilings(peaks["read_gb_s"] * 1e9, integer * 1e9, floating * 1e9)
