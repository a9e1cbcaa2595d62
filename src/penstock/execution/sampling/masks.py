"""What a request may not or should rather say: logit_bias, allowed_token_ids, min_tokens.

Token ids outside the vocabulary are ignored here; the edge refuses them before they come this far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.types import SamplingParams


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens some rows of logits may become. rows: int64 [N], ascending; bits: uint8 [N, ceil(V / 8)], token v is allowed where bit
    v % 8 of byte v // 8 is set."""

    rows: npt.NDArray[np.int64]
    bits: npt.NDArray[np.uint8]


def valid_token_ids(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    """The distinct ids inside the vocabulary, in ascending order."""
    return sorted({token_id for token_id in token_ids if 0 <= token_id < vocab_size})


def biases(params: SamplingParams, vocab_size: int) -> dict[int, float]:
    """What to add to the logit of which token. With allowed_token_ids, exactly those tokens are named and all others are forbidden."""
    if params.allowed_token_ids is None:
        ids = valid_token_ids(params.logit_bias, vocab_size)
    else:
        ids = valid_token_ids(params.allowed_token_ids, vocab_size)
    return {token_id: params.logit_bias.get(token_id, 0.0) for token_id in ids}


def forbidden_before_end(params: SamplingParams, eos_token_ids: tuple[int, ...], vocab_size: int) -> list[int]:
    """The tokens that would end a request before its output has min_tokens tokens; none without min_tokens.

    With ignore_eos the end-of-sequence tokens end nothing, so only stop_token_ids are forbidden.
    """
    if not params.min_tokens:
        return []
    stop_ids = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)
    return valid_token_ids(stop_ids, vocab_size)
