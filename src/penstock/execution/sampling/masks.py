"""What a request may not or should rather say: logit_bias, allowed_token_ids, min_tokens, and the masks of a grammar.

Token ids outside the vocabulary are ignored here; the edge refuses them before they come this far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.sampling import can_read, mask_logits


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


def forbid(logits: Tensor, masks: TokenMasks) -> None:
    """Minus infinity, in place, for tokens that are not allowed; what is not a number, or infinite, becomes or stays not a number.

    logits: float32 [M, V]. Raises IntegrityError for masks of another vocabulary.
    """
    vocab_size = logits.shape[1]
    if masks.bits.shape != (len(masks.rows), (vocab_size + 7) // 8):
        raise IntegrityError(f"masks of {masks.bits.shape} bytes for {len(masks.rows)} rows of {vocab_size} tokens")
    if native_available() and can_read(logits):
        mask_logits(logits, masks.rows, masks.bits)
    else:
        torch_forbid(logits, masks)


def torch_forbid(logits: Tensor, masks: TokenMasks) -> None:
    """`forbid` with torch's operators, on any device."""
    allowed = np.unpackbits(masks.bits, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    rows = torch.from_numpy(masks.rows).to(logits.device)
    with torch.inference_mode():  # what was made there may be overwritten only there
        some = logits[rows]
        logits[rows] = torch.where(torch.from_numpy(allowed).to(logits.device), some, some - torch.inf)
