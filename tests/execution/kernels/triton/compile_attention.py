"""Compiles paged attention for a GPU that is not here; see testing/triton_compile.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.execution.kernels.triton import attention
from penstock.testing.triton_compile import check_resources, compile_only

BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn


@dataclass(frozen=True)
class Launch:
    """Requests of `tokens / requests` query tokens each; with one, they are decodes."""

    requests: int
    tokens: int
    dim: int = 128
    query: torch.dtype = BF16
    key: torch.dtype = BF16
    value: torch.dtype = BF16
    window: int | None = None
    max_query_len: int | None = None


LAUNCHES = [
    Launch(4, 4),  # few requests, many splits
    Launch(256, 256, 64, FP16, FP16, FP16),  # none
    Launch(4, 4, key=INT8, value=INT8),
    Launch(256, 256, key=FP8, value=FP8),
    Launch(8, 32, max_query_len=4),
    Launch(2, 4096),
    Launch(2, 4096, 64, window=512),
    Launch(2, 4096, key=FP8, value=FP8),
    Launch(4, 4, 256, window=512),
    Launch(4, 4, 64, FP16, FP16, FP8),
    Launch(2, 4096, 256),
    Launch(2, 4096, 256, key=INT8, value=INT8),
    Launch(4, 16, 80, FP16, FP16, INT8),
]
# The first so many are compiled in the default tests.
NUM_ALWAYS = 8


def attend(launch: Launch) -> None:
    heads, kv_heads, width = 32, 8, 256
    query = torch.empty(launch.tokens, heads, launch.dim, dtype=launch.query)
    (key, key_scales), (value, value_scales) = (
        cached(dtype, launch.query, kv_heads, launch.dim) for dtype in (launch.key, launch.value)
    )
    attention.paged_attention(
        query,
        key,
        value,
        key_scales,
        value_scales,
        query_start=torch.empty(launch.requests + 1, dtype=torch.int32),
        seq_lens=torch.empty(launch.requests, dtype=torch.int32),
        block_tables=torch.empty(launch.requests, width, dtype=torch.int32),
        num_decodes=launch.requests if launch.tokens == launch.requests else 0,
        scale=0.1,
        sliding_window=launch.window,
        max_query_len=launch.max_query_len,
    )


def cached(dtype: torch.dtype, arithmetic: torch.dtype, kv_heads: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """Keys or values, and scales if they have 8 bits."""
    cache = torch.empty(4, 16, kv_heads, dim, dtype=dtype)
    return cache, None if dtype == arithmetic else torch.empty(4, 16, kv_heads)


def compile_kernels(capability: int, *, everything: bool) -> None:
    with compile_only(capability) as compiled:
        for launch in LAUNCHES if everything else LAUNCHES[:NUM_ALWAYS]:
            attend(launch)
    check_resources(compiled)
    assert sum(kernel.name == "combine_kernel" for kernel in compiled) >= 3, "decodes of few requests are split"
