"""Which tokens may be drawn: temperature, then top_k, top_p and min_p, each on what the one before left.

    top_k   keep a token if fewer than k tokens are strictly more likely than it
    top_p   keep a token if the tokens that are strictly more likely than it have less than p of what is left
            (nucleus sampling, Holtzman et al., "The curious case of neural text degeneration", 2020)
    min_p   keep a token if its probability is at least p times that of the most likely one
            (Nguyen et al., "Turning up the heat: min-p sampling", 2024)

Written this way equally likely tokens stay or go together, at least one token stays, and the three filters are one threshold per
row: the smallest logit that is kept. Finding it needs the largest logits in order, but rarely more than a few: the top
`PREFILTER` logits settle most rows, and only the others are sorted as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.execution.sampling.draw import row_sums

PREFILTER = 64


def scale_logits(logits: Tensor, maxima: Tensor, temperature: Tensor) -> Tensor:
    """(logits - maximum) / temperature, float32 [M, V]; the largest is 0, so that no temperature above 0 overflows.

    logits: float32 [M, V]; maxima: float32 [M, 1]; temperature: float32 [M], above 0.
    """
    return (logits - maxima).div_(temperature.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1))


def thresholds(scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest scaled logit that each row keeps, float32 [M].

    scaled: float32 [M, V] with maximum 0 in each row; weights: exp(scaled). top_k: int64 [M], V or more: off. top_p: float64 [M], 1: off.
    min_p: float64 [M], 0: off.
    """
    vocab_size = scaled.shape[1]
    totals = row_sums(weights)
    values = torch.topk(scaled, min(PREFILTER, vocab_size), dim=1).values
    result, settled = _thresholds_from(values, totals, top_k, top_p, min_p, vocab_size=vocab_size)
    if not bool(settled.all()):
        rows = torch.nonzero(~settled).squeeze(1)
        values = torch.sort(scaled[rows], dim=1, descending=True).values
        result[rows] = _thresholds_from(
            values, totals[rows], top_k[rows], top_p[rows], min_p[rows], vocab_size=vocab_size
        )[0]
    return result


def min_p_thresholds(min_p: Tensor) -> Tensor:
    """The smallest scaled logit that min_p alone keeps, float32 [M]; minus infinity where it is off."""
    return torch.log(min_p).to(torch.float32)


def _thresholds_from(
    values: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Thresholds [M], and whether `values` [M, W], the W largest scaled logits in descending order, were enough for them [M].

    totals: float64 [M], the mass of the whole row.
    """
    width = values.shape[1]
    last = values[:, -1]
    k_off = top_k >= vocab_size
    k_inside = top_k <= width
    kth = values.gather(1, (top_k.clamp(max=width) - 1).unsqueeze(1)).squeeze(1)
    k_threshold = torch.where(k_inside & ~k_off, kth, -torch.inf)

    # What top_k left: its ties included, which may lie beyond the values.
    mass = torch.exp(values).to(torch.float64)
    left = torch.where(k_off, totals, (mass * (values >= k_threshold.unsqueeze(1))).sum(dim=1))
    left_known = k_off | (k_inside & (last < kth))
    goal = top_p * left
    after = torch.cumsum(mass, dim=1)
    num_kept = ((after - mass) < goal.unsqueeze(1)).sum(dim=1).clamp(min=1)
    p_on = top_p < 1.0
    p_threshold = torch.where(p_on, values.gather(1, (num_kept - 1).unsqueeze(1)).squeeze(1), -torch.inf)

    # Whatever lies beyond the values has at most the last one's logit; min_p may rule it all out.
    m_threshold = min_p_thresholds(min_p)
    m_cuts = m_threshold > last
    p_settled = ~p_on | (left_known & ((num_kept < width) | (after[:, -1] >= goal) | m_cuts))
    settled = ((k_inside | k_off) & p_settled) | (m_cuts & ~p_on)
    if width == vocab_size:
        settled = torch.ones_like(settled)
    return torch.maximum(torch.maximum(k_threshold, p_threshold), m_threshold), settled
