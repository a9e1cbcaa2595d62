"""Compiles what writes the KV cache for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.execution.kernels.triton import cache_write
from penstock.testing.triton_compile import check_resources, compile_only

BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn


def write(tokens: int, dim: int, dtype: torch.dtype, key: torch.dtype, value: torch.dtype, norms: bool) -> None:
    heads, kv_heads = 32, 8
    (keys, key_scales), (values, value_scales) = (cached(x, dtype, kv_heads, dim) for x in (key, value))
    norm = torch.empty(dim, dtype=dtype) if norms else None
    cache_write.rotate_and_write(
        torch.empty(tokens, heads + 2 * kv_heads, dim, dtype=dtype),
        keys,
        values,
        key_scales,
        value_scales,
        table=torch.empty(64, dim),
        positions=torch.empty(tokens, dtype=torch.int64),
        slot_mapping=torch.empty(tokens, dtype=torch.int64),
        q_norm=norm,
        k_norm=norm,
        eps=1e-6,
    )


def cached(dtype: torch.dtype, arithmetic: torch.dtype, kv_heads: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """Keys or values, and scales if they have 8 bits."""
    cache = torch.empty(4, 16, kv_heads, dim, dtype=dtype)
    return cache, None if dtype == arithmetic else torch.empty(4, 16, kv_heads)


def compile_kernels(capability: int) -> None:
    with compile_only(capability) as compiled:
        for tokens in (1, 4096):
            write(tokens, 128, BF16, BF16, BF16, norms=True)
            write(tokens, 64, FP16, INT8, INT8, norms=False)
            write(tokens, 80, BF16, BF16, FP8, norms=True)
    check_resources(compiled)
