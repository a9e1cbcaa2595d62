"""Choosing one token per row: the most likely one, or one at random.

Both look at the row in chunks first and then inside one chunk, which reads the row once with vector instructions.

At random tokens race. Each has an exponential random number E(v) of its own, and the one with the smallest E(v) / weight(v) wins, which is
v with probability weight(v) / sum of weights. Where two rows with the same random numbers have nearly the same weights, nearly always the
same token wins: a draft model that draws with the numbers of the model proposes what the model will choose (Daliri et al. 2024,
arXiv:2408.07978; how often: speculative/coupling.py). So that a row needs V / CHUNK + CHUNK random numbers instead of V, chunks race first,
with the sums of their weights, and then the tokens of the winner:

    number n of the row    u(n) = uniform(start, n), E(n) = -log(u(n))
    chunk c                comes in at E(c) / sum of its weights
    token v                comes in at E(FIRST_TOKEN + v) / weight(v)

P(chunk) = its share of all weights and P(v | chunk) = v's share of the chunk's, and so P(v) = v's share of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.sampling.random import uniforms

CHUNK = 128
# Number of token 0's random number; those of chunks begin at 0.
FIRST_TOKEN = 2**32


def _chunks(values: Tensor, padding: float) -> Tensor:
    """[M, V] as [M, C, CHUNK], the last chunk filled up with `padding`."""
    missing = -values.shape[1] % CHUNK
    if missing:
        values = F.pad(values, (0, missing), value=padding)
    return values.contiguous().view(values.shape[0], -1, CHUNK)


def _pick(chunks: Tensor, index: Tensor) -> Tensor:
    """Chunk index[m] of each row m: [M, CHUNK]."""
    return chunks.gather(1, index.view(-1, 1, 1).expand(-1, 1, CHUNK)).squeeze(1)


def row_maxima(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value [M, 1] and its position, int64 [M], the first one on ties. Rows with NaN have a NaN maximum."""
    chunks = _chunks(values, -torch.inf)
    chunk_maxima = chunks.amax(dim=2)
    first = chunk_maxima.argmax(dim=1)
    offset = _pick(chunks, first).argmax(dim=1)
    return chunk_maxima.amax(dim=1, keepdim=True), first * CHUNK + offset


def row_sums(values: Tensor) -> Tensor:
    """Sum of each row of float32 [M, V]: float64 [M]. A row's result does not depend on the other rows."""
    return _chunks(values, 0.0).sum(dim=2).sum(dim=1, dtype=torch.float64)


def draw(weights: Tensor, starts: Tensor) -> Tensor:
    """A token per row, int64 [M], each with a probability in proportion to its weight.

    weights: float32 [M, V], not negative, need not sum to 1, at least one above 0 per row; a token of weight 0 is never drawn.
    starts: int64 [M], random.position_starts.
    """
    chunks = _chunks(weights, 0.0)
    starts = starts.unsqueeze(1)
    chunk_numbers = torch.arange(chunks.shape[1], device=weights.device)
    index = _first(chunks.sum(dim=2), starts, chunk_numbers)
    tokens = index.unsqueeze(1) * CHUNK + torch.arange(CHUNK, device=weights.device)
    return index * CHUNK + _first(_pick(chunks, index), starts, tokens + FIRST_TOKEN)


def _first(weights: Tensor, starts: Tensor, numbers: Tensor) -> Tensor:
    """Which of the N entrants of a race comes in first, the first of equals: int64 [M]. weights [M, N]; starts int64 [M, 1]; numbers int64
    [N] or [M, N], of the entrants' random numbers."""
    # Who has no weight comes in at infinity.
    return (-uniforms(starts, numbers).log() / weights.to(torch.float64)).argmin(dim=1)
