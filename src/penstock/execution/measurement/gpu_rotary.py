"""Cases of the GPU benchmark: heads are rotated and written to the paged cache in one kernel, beside torch's operators for the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.execution.kernels.triton.cache_write import rotate_and_write, rotate_and_write_twin
from penstock.execution.measurement.gpu_attention import BLOCK_SIZE, KV_TYPES, SCALE_BYTES
from penstock.execution.measurement.gpu_timing import (
    GPUCase,
    arithmetic_of,
    copies_for,
    relative_error,
    tolerance_of,
)

POSITIONS = 4096
EPS = 1e-6


@dataclass(frozen=True)
class _Cache:
    key: Tensor
    value: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    def read(self) -> Tensor:
        """All keys and values as numbers, float32."""
        parts = []
        for cache, scales in ((self.key, self.key_scales), (self.value, self.value_scales)):
            numbers = cache.to(torch.float32)
            parts.append(numbers if scales is None else numbers * scales.unsqueeze(-1))
        return torch.cat([part.flatten() for part in parts])


def rotary_case(
    heads: tuple[int, int, int], rows: int, kv_type: str, dtype: torch.dtype, device: torch.device
) -> GPUCase:
    """heads: (query heads, key/value heads, head size). Query and key heads are normalised on the way, as Qwen3 has it."""
    num_heads, num_kv_heads, head_dim = heads
    stored = KV_TYPES[kv_type] or dtype
    written = 2 * num_kv_heads * (head_dim * stored.itemsize + (SCALE_BYTES if KV_TYPES[kv_type] else 0))
    nbytes = float(rows * ((2 * num_heads + 2 * num_kv_heads) * head_dim * dtype.itemsize + written))
    copies = copies_for(nbytes)
    projected = torch.randn(copies, rows, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    cache = _empty_cache(rows, num_kv_heads, head_dim, stored, device)
    norms = torch.rand(2, head_dim, device=device).add_(0.5).to(dtype)
    angles = torch.rand(POSITIONS, head_dim // 2, device=device) * 6.0
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(0, POSITIONS, (rows,), device=device)
    slots = torch.randperm(cache.key.shape[0] * BLOCK_SIZE, device=device)[:rows]

    def call(function: Callable[..., Tensor], copy: int) -> Tensor:
        return function(
            projected[copy],
            cache.key,
            cache.value,
            cache.key_scales,
            cache.value_scales,
            table=table,
            positions=positions,
            slot_mapping=slots,
            q_norm=norms[0],
            k_norm=norms[1],
            eps=EPS,
        )

    def error() -> float:
        query, numbers = call(rotate_and_write, 0), cache.read()
        return max(relative_error(query, call(rotate_and_write_twin, 0)), relative_error(numbers, cache.read()))

    return GPUCase(
        kernel=f"rotate_and_write, {kv_type} KV",
        shape=f"{num_heads}/{num_kv_heads} heads of {head_dim}",
        rows=rows,
        bytes_moved=nbytes,
        operations=0.0,
        arithmetic=arithmetic_of(dtype),
        copies=copies,
        run=lambda copy: call(rotate_and_write, copy),
        references={"torch": lambda copy: call(rotate_and_write_twin, copy)},
        error=error,
        # A number that lies between two codes may go to either.
        tolerance=tolerance_of(dtype) if KV_TYPES[kv_type] is None else 1e-2,
    )


def _empty_cache(rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> _Cache:
    shape = (-(-rows // BLOCK_SIZE) + 1, BLOCK_SIZE, kv_heads, head_dim)
    key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return _Cache(key, value, None, None)
    scales = [torch.zeros(shape[:3], device=device) for _ in range(2)]
    return _Cache(key, value, scales[0], scales[1])
