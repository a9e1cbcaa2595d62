"""Penalties on tokens that were already used.

    repetition   logit / r where it is positive, logit * r where it is negative, for tokens of prompt and output
                 (Keskar et al., "CTRL", 2019; as in transformers and vLLM)
    frequency    logit - f * (times the token is in the output)
    presence     logit - p if the token is in the output   (both as in OpenAI's API)

in this order. Only the tokens that were used are touched: their counts are kept per request and follow the output token by token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams


def uses_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def count_tokens(
    prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32], vocab_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The distinct tokens of prompt and output inside the vocabulary, and how often each is in the output.

    The counts are floats, exact up to 2**24, because they are only multiplied.
    """
    ids, places = np.unique(np.concatenate([prompt, output]), return_inverse=True)
    counts = np.bincount(places[len(prompt) :], minlength=len(ids)).astype(np.float32)
    valid = (ids >= 0) & (ids < vocab_size)
    return ids[valid], counts[valid]


def penalised(logits: Tensor, counts: Tensor, *, presence: Tensor, frequency: Tensor, repetition: Tensor) -> Tensor:
    """The logits of used tokens after their penalties, all float32 [N]; `counts`: times a token is in the output."""
    logits = torch.where(logits > 0, logits / repetition, logits * repetition) - counts * frequency
    return torch.where(counts > 0, logits - presence, logits)
