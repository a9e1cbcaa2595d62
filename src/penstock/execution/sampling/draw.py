"""Choosing one token per row: the most likely one, or one at random.

Both look at the row in chunks first and then inside one chunk, which reads the row once with vector instructions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 128


def _chunks(values: Tensor, padding: float) -> Tensor:
    """[M, V] as [M, C, _CHUNK], the last chunk filled up with `padding`."""
    missing = -values.shape[1] % _CHUNK
    if missing:
        values = F.pad(values, (0, missing), value=padding)
    return values.contiguous().view(values.shape[0], -1, _CHUNK)


def _pick(chunks: Tensor, index: Tensor) -> Tensor:
    """Chunk index[m] of each row m: [M, _CHUNK]."""
    return chunks.gather(1, index.view(-1, 1, 1).expand(-1, 1, _CHUNK)).squeeze(1)


def row_maxima(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value [M, 1] and its position, int64 [M], the first one on ties. Rows with NaN have a NaN maximum."""
    chunks = _chunks(values, -torch.inf)
    chunk_maxima = chunks.amax(dim=2)
    first = chunk_maxima.argmax(dim=1)
    offset = _pick(chunks, first).argmax(dim=1)
    return chunk_maxima.amax(dim=1, keepdim=True), first * _CHUNK + offset


def row_sums(values: Tensor) -> Tensor:
    """Sum of each row of float32 [M, V]: float64 [M]. A row's result does not depend on the other rows."""
    return _chunks(values, 0.0).sum(dim=2).sum(dim=1, dtype=torch.float64)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """A token per row, int64 [M], by inverting the cumulative distribution in the order of token ids.

    weights: float32 [M, V], not negative, need not sum to 1, at least one above 0 per row; a token of weight 0 is never drawn.
    uniforms: float64 [M], strictly between 0 and 1.
    """
    chunks = _chunks(weights, 0.0)
    before_chunk = chunks.sum(dim=2).to(torch.float64).cumsum(dim=1)
    goal = before_chunk[:, -1:] * uniforms.unsqueeze(1)
    index = _first_above(before_chunk, goal)
    before = torch.where(index > 0, before_chunk.gather(1, (index - 1).clamp(min=0)), 0.0)
    inside = _pick(chunks, index)
    offset = _first_above(inside.to(torch.float64).cumsum(dim=1) + before, goal)
    # The chunk's sum and the running sum inside it round differently: never step past the last token with weight.
    last = _CHUNK - 1 - (inside.flip(1) > 0).to(torch.uint8).argmax(dim=1, keepdim=True)
    return (index * _CHUNK + torch.minimum(offset, last)).squeeze(1)


def _first_above(cumulative: Tensor, goal: Tensor) -> Tensor:
    """First index at which the ascending [M, N] exceeds goal [M, 1]: int64 [M, 1], at most N - 1."""
    return torch.searchsorted(cumulative, goal, right=True).clamp(max=cumulative.shape[1] - 1)
