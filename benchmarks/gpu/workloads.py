"""What engines are asked: lengths and token ids from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from penstock.workbench.bench.workload import BenchRequest

NANO_SEQUENCES = 256
NANO_LOW, NANO_HIGH = 100, 1024
NANO_IDS = 10_001
# Added to every id from one round to the next, so that no round finds another one's prompts in a prefix cache.
_SHIFT = 3_917


@dataclass(frozen=True)
class Nano:
    """The workload of nano-vllm's bench.py: 256 prompts of 100 to 1,024 random ids, as many tokens to generate, temperature 0.6."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)

    def requests(self, number: int = 0) -> list[BenchRequest]:
        """Round `number`: the same lengths, ids of its own; round 0 has the ids of bench.py."""
        return [
            BenchRequest(index, [(token + _SHIFT * number) % NANO_IDS for token in prompt], len(prompt), output)
            for index, (prompt, output) in enumerate(zip(self.prompts, self.outputs, strict=True))
        ]


def nano(sequences: int = NANO_SEQUENCES, *, low: int = NANO_LOW, high: int = NANO_HIGH) -> Nano:
    """Drawn in the order of bench.py after random.seed(0): every prompt's length, then its ids; when all prompts are there, the outputs."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, NANO_IDS - 1) for _ in range(rng.randint(low, high))] for _ in range(sequences)]
    return Nano(prompts, [rng.randint(low, high) for _ in range(sequences)])


def shortened(workload: Nano, sequences: int, longest: int) -> Nano:
    """The first `sequences` of a workload, prompts and outputs cut to `longest` tokens: for engines too slow for the whole."""
    return Nano(
        [prompt[:longest] for prompt in workload.prompts[:sequences]],
        [min(output, longest) for output in workload.outputs[:sequences]],
    )
