"""Cases of `penstock bench kernels`: tokens from logits, native beside torch's operators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.execution.kernels.sampling import SAMPLING_SLOT, sample_tokens
from penstock.execution.measurement.timing import Case, copies_needed, rotation

VOCABULARIES = {"tinyllama-1.1b": 32000, "qwen2.5-0.5b": 151936}
REQUESTS = (1, 32)
TOP_P = 0.9


def sampling_cases(model: str) -> Iterator[Case]:
    """Greedy choice, and a draw from the top 90 % of the probability, for one request and for 32."""
    vocabulary = VOCABULARIES[model]
    for requests in REQUESTS:
        logits = [torch.randn(requests, vocabulary) for _ in range(copies_needed(4 * requests * vocabulary))]
        for name, temperature in (("greedy", 0.0), (f"top-p {TOP_P}", 1.0)):
            yield _case(name, temperature, logits)


def _case(name: str, temperature: float, logits: list[Tensor]) -> Case:
    requests, vocabulary = logits[0].shape
    records = np.zeros(requests, dtype=SAMPLING_SLOT)
    records["temperature"], records["repetition"], records["top_p"] = temperature, 1.0, TOP_P if temperature else 1.0
    slots = np.arange(requests, dtype=np.int64)
    own, others = rotation(logits), rotation(logits)
    return Case(
        kernel=f"sampling, {name}",
        shape=f"vocabulary {vocabulary}",
        rows=requests,
        bytes_read=4.0 * requests * vocabulary,
        operations=0.0,
        arithmetic="float32",
        run=lambda: sample_tokens(next(own), records, slots, slots),
        reference=lambda: _torch_draw(next(others), temperature),
        reference_name="argmax" if not temperature else "sort, cumsum, multinomial",
    )


def _torch_draw(logits: Tensor, temperature: float) -> Tensor:
    """What the textbook writes: sort all, keep the shortest prefix that has the probability, draw."""
    if not temperature:
        return logits.argmax(-1)
    ordered, ids = logits.softmax(-1).sort(-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > TOP_P, 0.0)
    return ids.gather(-1, torch.multinomial(kept, 1))
