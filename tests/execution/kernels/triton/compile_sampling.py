"""Compiles the kernels of sampling for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch

from penstock.execution.kernels.triton.logprobs import find_top_logprobs
from penstock.execution.kernels.triton.sampling import (
    BLOCK,
    PARAMETER_WORDS,
    SamplingTables,
    SamplingWorkspace,
    choose_largest,
)
from penstock.execution.kernels.triton.sampling_draw import draw_tokens
from penstock.execution.kernels.triton.sampling_keys import pivot_distances
from penstock.execution.kernels.triton.token_masks import forbid_tokens
from penstock.testing.triton_compile import check_resources, compile_only

CPU = torch.device("cpu")
ROWS = 2


def compile_for(capability: int, vocab_size: int, dtype: torch.dtype) -> None:
    stride = -(-vocab_size // BLOCK) * BLOCK
    tables = SamplingTables(
        torch.zeros(ROWS, PARAMETER_WORDS, dtype=torch.int64),
        torch.zeros(1, stride, dtype=torch.int16),
        torch.zeros(1, stride),
    )
    workspace, pivots = SamplingWorkspace(ROWS, vocab_size, CPU), pivot_distances(CPU)
    slots, positions = torch.arange(ROWS), torch.arange(ROWS)
    logits = torch.zeros(ROWS, vocab_size, dtype=dtype)
    with compile_only(capability) as compiled:
        edit = dtype is torch.float32
        sampled = choose_largest(logits, slots, positions, tables, workspace, edit=edit, count=edit)
        for filtered in (False, True):
            draw_tokens(logits, slots, positions, pivots, tables, workspace, sampled, filtered=filtered, count=edit)
        forbid_tokens(logits, slots, torch.zeros(ROWS, -(-vocab_size // 8), dtype=torch.uint8))
        find_top_logprobs(logits, slots, slots, sampled.token_ids, 20)
    check_resources(compiled)


def compile_kernels(capability: int, *, everything: bool) -> None:
    compile_for(capability, 151_936, torch.bfloat16)
    if everything or capability == 90:
        compile_for(capability, 262_144 if capability == 90 else 32_000, torch.float32)
