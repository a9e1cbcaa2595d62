"""All cases of `penstock bench kernels`, in groups that can be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from penstock.core.errors import ConfigError
from penstock.execution.kernels import native
from penstock.execution.measurement.attention import KV_TYPES, attention_cases
from penstock.execution.measurement.ceilings import Ceilings, higher_of, measure_ceilings
from penstock.execution.measurement.linear import KINDS, MODELS, linear_cases
from penstock.execution.measurement.sampling import sampling_cases
from penstock.execution.measurement.timing import Case, Timing, time_case, without_memory

GROUPS = ("linear", "attention", "sampling")


def measure_kernels(
    threads: int,
    models: Sequence[str],
    groups: Sequence[str],
    kinds: Sequence[str],
    tokens: Sequence[int],
    budget_s: float,
    on_timing: Callable[[Timing], None],
) -> tuple[Ceilings, list[Timing]]:
    """Measure the chosen cases one after the other, and the ceilings before and after. Empty `models` and `kinds`: all.

    The threads of torch and of the kernels are set for the whole process. Raises ConfigError where there are no native kernels.
    """
    if not native.native_available():
        raise ConfigError(f"There are no native CPU kernels to measure: {native.unavailable_reason()}.")
    before = measure_ceilings(threads)
    native.set_threads(threads)
    timings = []
    with torch.inference_mode():
        for case in _cases(models or tuple(MODELS), groups, kinds or KINDS, tokens, before.bfloat16 is not None):
            timing = time_case(case, budget_s)
            timings.append(dataclasses.replace(timing, case=without_memory(timing.case)))
            on_timing(timing)
    return higher_of(before, measure_ceilings(threads)), timings


def _cases(
    models: Sequence[str], groups: Sequence[str], kinds: Sequence[str], tokens: Sequence[int], bf16_arithmetic: bool
) -> Iterator[Case]:
    for model in models:
        if "linear" in groups:
            for kind in kinds:
                yield from linear_cases(model, kind, tokens, bf16_arithmetic=bf16_arithmetic)
        if "attention" in groups:
            for kv_type in KV_TYPES:
                yield from attention_cases(model, kv_type)
        if "sampling" in groups:
            yield from sampling_cases(model)
