"""What was set as a goal for one H200, and whether a measurement reaches it.

A result is the median of rounds with an order-statistic interval (penstock.workbench.bench.compare). It reaches a level when its whole
interval does; an interval across the border of two levels, or fewer than five rounds, decides nothing between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.workbench.bench.compare import MIN_PAIRS, spread

LEVELS = ("below must", "must", "good", "stretch")


@dataclass(frozen=True)
class Target:
    """Three levels of one figure; None: not set. smaller: whether less is better."""

    must: float
    good: float
    stretch: float | None = None
    smaller: bool = False

    def level(self, value: float) -> int:
        """How many levels `value` reaches: an index into LEVELS."""
        reached = 0
        for bound in (self.must, self.good, self.stretch):
            if bound is None or (value > bound if self.smaller else value < bound):
                break
            reached += 1
        return reached

    def verdict(self, values: Sequence[float]) -> str:
        """One of LEVELS, or what it cannot be decided between. `values`: one figure for each round."""
        found = spread(values)
        ends = sorted((self.level(found.low), self.level(found.high)))
        if found.pairs < MIN_PAIRS:
            return f"undecided (n={found.pairs})"
        if ends[0] == ends[1]:
            return LEVELS[ends[0]]
        return f"undecided: {LEVELS[ends[0]]} or {LEVELS[ends[1]]}"

    def cells(self) -> list[str]:
        """The three levels as a table has them."""
        return ["–" if bound is None else f"{bound:,g}" for bound in (self.must, self.good, self.stretch)]


# Output tokens per second of one request, by (shape, precision).
SINGLE_STREAM = {
    ("tinyllama-1.1b", "bf16"): Target(1000, 1250, 1600),
    ("tinyllama-1.1b", "int8"): Target(1500, 1900, 2500),
    ("tinyllama-1.1b", "int4"): Target(1700, 2300, 3000),
    ("qwen2.5-1.5b", "bf16"): Target(800, 950, 1080),
    ("llama-3.1-8b", "bf16"): Target(215, 240, 260),
    ("llama-3.1-8b", "fp8"): Target(330, 430, 490),
    ("llama-3.1-8b", "int4"): Target(420, 560, 690),
}
# Output tokens per second of a batch with 1,024 tokens of context each, by (shape, requests), in bf16.
BATCH = {
    ("tinyllama-1.1b", 64): Target(35e3, 50e3, 60e3),
    ("tinyllama-1.1b", 256): Target(65e3, 95e3, 115e3),
    ("qwen2.5-1.5b", 256): Target(50e3, 72e3, 88e3),
    ("llama-3.1-8b", 64): Target(7e3, 9e3, 10.3e3),
    ("llama-3.1-8b", 256): Target(13e3, 17e3, 19.5e3),
}
# Output tokens per second of nano-vllm's workload, in bf16.
NANO = {
    "qwen3-0.6b": Target(18e3, 24e3, 29e3),
    "tinyllama-1.1b": Target(40e3, 55e3, 68e3),
    "qwen2.5-1.5b": Target(32e3, 43e3, 52e3),
    "llama-3.1-8b": Target(8e3, 10e3, 11.5e3),
}
# Output tokens per second, 1,000 tokens in and out, everything at once, in fp8.
OFFLINE = {"llama-3.1-8b": Target(10e3, 14e3, 17.7e3)}
# Milliseconds to the first token of 1,024, engine idle.
TTFT_MS = {
    "tinyllama-1.1b": Target(15, 8, 5, smaller=True),
    "llama-3.1-8b": Target(45, 30, 25, smaller=True),
}
# Share of a step in which the GPU waits for the CPU.
CPU_SHARE = Target(0.15, 0.05, None, smaller=True)
# Time with the prefix cache over the time without, nothing hits.
PREFIX_COST = Target(1.03, 1.01, None, smaller=True)
# Speed over that of SDPA's flash kernel; 1 is as fast.
PREFILL_ATTENTION = Target(0.7, 0.9, 1.0)
# Share of the time that the bytes alone take.
DECODE_ATTENTION = Target(0.60, 0.75, 0.85)
