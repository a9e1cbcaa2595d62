"""Cases of the GPU benchmark: tokens from logits on the device, beside torch's argmax and the textbook's sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.measurement.gpu_timing import GPUCase, IndexedRun, copies_for
from penstock.execution.sampling.device_sampler import DeviceSampler
from penstock.execution.sampling.sampler import Sampler

TOP_K, TOP_P = 50, 0.9
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    f"top-p {TOP_P}": SamplingParams(temperature=0.8, top_p=TOP_P),
    f"top-k {TOP_K}, top-p {TOP_P}": SamplingParams(temperature=0.8, top_k=TOP_K, top_p=TOP_P),
}
# Sums of probabilities are rounded in another order; a draw that lies at a border may fall on either side.
TOLERATED_SHARE = 0.02


def sampling_cases(vocabulary: int, rows: int, device: torch.device) -> Iterator[GPUCase]:
    """Greedy choice and draws with and without filters, for `rows` requests. Logits are float32, spread as a model's are."""
    copies = copies_for(4.0 * rows * vocabulary)
    logits = torch.randn(copies, rows, vocabulary, device=device).mul_(3.0)
    for name, params in SETTINGS.items():
        run = _run(logits, params)
        yield GPUCase(
            kernel=f"sampling, {name}",
            shape=f"vocabulary {vocabulary}",
            rows=rows,
            bytes_moved=4.0 * rows * vocabulary,
            operations=0.0,
            arithmetic="float32",
            copies=copies,
            run=run,
            references=_references(logits, params),
            error=_error(run, logits[0].cpu(), params),
            tolerance=TOLERATED_SHARE,
        )


def _run(logits: Tensor, params: SamplingParams) -> Callable[[int], Tensor]:
    rows, vocabulary = logits.shape[1:]
    sampler = DeviceSampler(vocabulary, rows, logits.device)
    _fill(sampler, rows, params)
    slots, device_slots = np.arange(rows, dtype=np.int64), torch.arange(rows, device=logits.device)
    return lambda copy: sampler.launch(logits[copy], slots, device_slots, device_slots).token_ids


def _error(run: Callable[[int], Tensor], logits: Tensor, params: SamplingParams) -> Callable[[], float]:
    """Share of rows whose token is not the one that the definition, on the host, gives for the same numbers."""

    def error() -> float:
        rows, vocabulary = logits.shape
        definition = Sampler(vocabulary, rows, torch.device("cpu"))
        _fill(definition, rows, params)
        numbers = np.arange(rows, dtype=np.int64)
        expected = definition.sample(logits.clone(), numbers, numbers).token_ids
        return float((run(0).cpu() != torch.from_numpy(expected)).float().mean())

    return error


def _fill(sampler: DeviceSampler | Sampler, rows: int, params: SamplingParams) -> None:
    empty = np.zeros(0, dtype=np.int32)
    for slot in range(rows):
        sampler.add(slot, params, seed=slot, sample_index=0, prompt=empty, output=empty)


def _references(logits: Tensor, params: SamplingParams) -> dict[str, IndexedRun]:
    """What the textbook writes: softmax; sort all, keep the shortest prefix that has the probability; draw."""

    def draw(copy: int) -> Tensor:
        probabilities = (logits[copy] / params.temperature).softmax(-1)
        if params.top_k <= 0 and params.top_p >= 1:
            return torch.multinomial(probabilities, 1)
        ordered, ids = probabilities.sort(-1, descending=True)
        if params.top_k > 0:
            ordered[:, params.top_k :] = 0.0
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > params.top_p, 0.0)
        return ids.gather(-1, torch.multinomial(kept, 1))

    if not params.temperature:
        return {"torch argmax": lambda copy: logits[copy].argmax(-1)}
    return {"torch": draw}
