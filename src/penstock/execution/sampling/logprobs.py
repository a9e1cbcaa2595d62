"""Log-probabilities of the model's own distribution: softmax of the logits as they leave the model, before any processing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import TokenLogprobs
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.sampling import can_read, find_logprobs

# Logits that exist at once while prompt log-probabilities are computed.
MAX_LOGITS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LogprobRows:
    """Log-probabilities of M tokens.

    token_ids: int64 [M], logprobs: float32 [M], ranks: int64 [M] (1 + number of strictly more likely tokens), top_ids: int64 [M, K],
    top_logprobs: float32 [M, K], most likely first, lower token id first among equals.
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float32]

    def to_structs(self, num_top: list[int]) -> list[TokenLogprobs]:
        """The wire form, with num_top[m] alternatives for token m."""
        columns = zip(
            self.token_ids.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
            num_top,
            strict=True,
        )
        return [
            TokenLogprobs(token_id, logprob, rank, list(zip(top_ids[:count], top_logprobs[:count], strict=True)))
            for token_id, logprob, rank, top_ids, top_logprobs, count in columns
        ]


def token_logprobs(
    logits: Tensor, token_ids: npt.NDArray[np.int64], num_top: int, rows: npt.NDArray[np.int64] | None = None
) -> LogprobRows:
    """Log-probabilities of token_ids, int64 [M], and of the `num_top` most likely tokens, under logits, float32 [R, V].

    rows: int64 [M], the row of each token; None: the first M.
    """
    num_top = min(num_top, logits.shape[1])
    if native_available() and can_read(logits):
        logprobs, ranks, top_ids, top_logprobs = find_logprobs(logits, rows, token_ids, num_top)
        return LogprobRows(token_ids, logprobs, ranks, top_ids, top_logprobs)
    if rows is not None:
        logits = logits[torch.from_numpy(rows).to(logits.device)]
    return torch_token_logprobs(logits, token_ids, num_top)


def torch_token_logprobs(logits: Tensor, token_ids: npt.NDArray[np.int64], num_top: int) -> LogprobRows:
    """`token_logprobs` with torch's operators, on any device: token m under row m."""
    found = logprob_tensors(logits, torch.from_numpy(token_ids).to(logits.device), num_top)
    logprobs, ranks, top_ids, top_logprobs = (tensor.cpu().numpy() for tensor in found)
    return LogprobRows(token_ids, logprobs, ranks, top_ids, top_logprobs)


def logprob_tensors(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers of `LogprobRows` where the logits, float32 [M, V], are, without waiting for them: logprobs, ranks, top_ids and
    top_logprobs of token_ids, int64 [M]."""
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
    ranks = (logits > chosen).sum(dim=1) + 1
    top_values, top_ids = torch.topk(logits, num_top, dim=1)
    # topk leaves the order of equals open.
    top_ids, by_id = torch.sort(top_ids, dim=1)
    top_values, by_value = torch.sort(top_values.gather(1, by_id), dim=1, descending=True, stable=True)
    return (chosen - normalizer).squeeze(1), ranks, top_ids.gather(1, by_value), top_values - normalizer


def prompt_token_logprobs(
    hidden: Tensor,
    rows: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.int64],
    num_top: list[int],
    *,
    compute_logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens, computing the logits of a few rows at a time.

    hidden: [T, H]; rows: int64 [M], the hidden state that predicts each token; token_ids: int64 [M]; num_top: alternatives wanted for
    each token; compute_logits: [m, H] → float32 [m, V]. Never more than `max_logits_bytes` of logits (and never less than one row) at once.
    """
    rows_at_once = max(1, max_logits_bytes // (4 * vocab_size))
    entries: list[TokenLogprobs] = []
    for start in range(0, len(num_top), rows_at_once):
        part = slice(start, start + rows_at_once)
        logits = compute_logits(hidden[torch.from_numpy(rows[part]).to(hidden.device)])
        entries += token_logprobs(logits, token_ids[part], max(num_top[part])).to_structs(num_top[part])
    return entries
