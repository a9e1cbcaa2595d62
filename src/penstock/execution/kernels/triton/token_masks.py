"""Bit masks over the vocabulary: tokens that a grammar forbids get a logit of minus infinity, where the logits are.

A program has a block of tokens of one masked row: it reads an eighth of a byte per token, and reads and writes the logits that are
forbidden. A row of 152k tokens costs 19 KB of mask and at most two passes over itself, about what the sampling that follows takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def forbid_tokens(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """logits[rows[n], v] -= inf where bit v % 8 of bits[n, v // 8] is not set, so that what is no number stays none.

    logits: [M, V], any float type, columns adjacent; rows: int64 [N]; bits: uint8 [N, ceil(V / 8)].
    """
    vocab_size = logits.shape[1]
    _forbid_kernel[(triton.cdiv(vocab_size, _BLOCK), len(rows))](
        logits, rows, bits, vocab_size, logits.stride(0), bits.stride(0), BLOCK=_BLOCK, num_warps=4
    )


def forbid_tokens_twin(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """`forbid_tokens` in torch's operators."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    allowed = ((bits.unsqueeze(2) >> shifts) & 1).view(len(rows), -1)[:, : logits.shape[1]]
    logits[rows] = torch.where(allowed == 0, logits[rows] - torch.inf, logits[rows])


@triton.jit
def _forbid_kernel(logits, rows, bits, vocab_size, stride, bits_stride, BLOCK: tl.constexpr):
    number = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    byte = tl.load(bits + number * bits_stride + tokens // 8, mask=inside, other=255).to(tl.int32)
    forbidden = inside & (((byte >> (tokens % 8)) & 1) == 0)
    place = logits + tl.load(rows + number) * stride + tokens
    values = tl.load(place, mask=forbidden, other=0.0).to(tl.float32) - float("inf")
    tl.store(place, values.to(logits.dtype.element_ty), mask=forbidden)
