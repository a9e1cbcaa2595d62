"""What backends do with blocks as wholes: memory for them, copies, and moves between device and host. The layout inside does not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.execution.attention.backend import KVCache, Move

# Bytes; a cache line, and the widest vector.
_ALIGNMENT = 64


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory. On a CPU the system gives a page when it is first written; torch.zeros would write them all here and now. There the
    memory goes on for one more vector, because kernels may read the last vector of a row past the row's end."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 2 * _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


def host_zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed main memory; pinned when `device` is a GPU, which copies from there without a detour."""
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    return zeroed(shape, dtype, torch.device("cpu"))


def copy_blocks(kv_caches: Sequence[KVCache], source: Tensor, target: Tensor) -> None:
    """See AttentionBackend.copy_blocks."""
    for cache in kv_caches:
        for tensor in cache.tensors:
            tensor.index_copy_(0, target, tensor.index_select(0, source))


def move_blocks(sources: Sequence[KVCache], targets: Sequence[KVCache], moves: Sequence[Move]) -> None:
    """Copy block `source` of each layer of `sources` to block `target` of `targets`, which may be on another device."""
    if not moves:
        return
    source_ids = torch.tensor([move.source for move in moves], dtype=torch.int64)
    target_ids = torch.tensor([move.target for move in moves], dtype=torch.int64)
    for source, target in zip(sources, targets, strict=True):
        for here, there in zip(source.tensors, target.tensors, strict=True):
            blocks = here.index_select(0, source_ids.to(here.device))
            there.index_copy_(0, target_ids.to(there.device), blocks.to(there.device))
