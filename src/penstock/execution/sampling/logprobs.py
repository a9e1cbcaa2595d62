"""Log-probabilities of the model's own distribution: softmax of the logits as they leave the model, before any processing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.types import TokenLogprobs

# Logits that exist at once while prompt log-probabilities are computed.
MAX_LOGITS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LogprobRows:
    """Log-probabilities of M tokens on the device.

    token_ids: int64 [M], logprobs: float32 [M], ranks: int64 [M] (1 + number of strictly more likely tokens), top_ids: int64 [M, K],
    top_logprobs: float32 [M, K], most likely first, lower token id first among equals.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

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


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobRows:
    """Log-probabilities of token_ids, int64 [M], and of the `num_top` most likely tokens, under logits, float32 [M, V]."""
    normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits > chosen).sum(dim=1) + 1
    top_values, top_ids = torch.topk(logits, min(num_top, logits.shape[1]), dim=1)
    # topk leaves the order of equals open.
    top_ids, by_id = torch.sort(top_ids, dim=1)
    top_values, by_value = torch.sort(top_values.gather(1, by_id), dim=1, descending=True, stable=True)
    return LogprobRows(
        token_ids=token_ids,
        logprobs=(chosen - normalizer).squeeze(1),
        ranks=ranks,
        top_ids=top_ids.gather(1, by_value),
        top_logprobs=top_values - normalizer,
    )


def prompt_token_logprobs(
    hidden: Tensor,
    rows: Tensor,
    token_ids: Tensor,
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
        logits = compute_logits(hidden[rows[part]])
        entries += token_logprobs(logits, token_ids[part], max(num_top[part])).to_structs(num_top[part])
    return entries
