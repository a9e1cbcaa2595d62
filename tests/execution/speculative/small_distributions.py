"""Samplers of many requests, for tests of distributions."""

from collections.abc import Sequence

import numpy as np
import torch

from penstock.core.types import SamplingParams
from penstock.execution.sampling.sampler import Sampler


def sampler_for(params: SamplingParams, seeds: Sequence[int], prompt: Sequence[int], vocab_size: int) -> Sampler:
    """A sampler with a request in slot i for seeds[i], all of them with the same parameters and prompt."""
    sampler = Sampler(vocab_size, len(seeds), torch.device("cpu"))
    for slot, seed in enumerate(seeds):
        sampler.add(
            slot,
            params,
            seed=seed,
            sample_index=0,
            prompt=np.array(prompt, dtype=np.int32),
            output=np.array([], dtype=np.int32),
        )
    return sampler
