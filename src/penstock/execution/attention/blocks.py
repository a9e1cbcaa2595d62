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
        for tensor in map(_movable, cache.tensors):
            tensor.index_copy_(0, target, tensor.index_select(0, source))


def move_blocks(sources: Sequence[KVCache], targets: Sequence[KVCache], moves: Sequence[Move]) -> None:
    """Copy block `source` of each layer of `sources` to block `target` of `targets`. One of them may be a GPU's memory and the other the
    host's, pinned: to the host, all is there on return; to the GPU, it is ordered before later work of the current stream, and the
    host's blocks may be overwritten on return."""
    if not moves:
        return
    source_ids = torch.tensor([move.source for move in moves], dtype=torch.int64)
    target_ids = torch.tensor([move.target for move in moves], dtype=torch.int64)
    pairs = [
        (_movable(here), _movable(there))
        for source, target in zip(sources, targets, strict=True)
        for here, there in zip(source.tensors, target.tensors, strict=True)
    ]
    here, there = pairs[0]
    if here.device == there.device:
        for here, there in pairs:
            there.index_copy_(0, target_ids.to(there.device), here.index_select(0, source_ids.to(here.device)))
    elif here.device.type == "cuda":
        _copy_to_host(pairs, source_ids.pin_memory().to(here.device, non_blocking=True), target_ids)
    else:
        _copy_to_gpu(pairs, source_ids, target_ids.pin_memory().to(there.device, non_blocking=True))


def _copy_to_host(pairs: Sequence[tuple[Tensor, Tensor]], source_ids: Tensor, target_ids: Tensor) -> None:
    """One transfer per tensor, all of them on their way before the first is waited for. The GPU gathers blocks, one tensor at a time."""
    arriving = []
    for here, there in pairs:
        blocks = torch.empty((len(target_ids), *there.shape[1:]), dtype=there.dtype, pin_memory=True)
        blocks.copy_(here.index_select(0, source_ids), non_blocking=True)
        arriving.append((there, blocks))
    torch.cuda.current_stream(source_ids.device).synchronize()
    for there, blocks in arriving:
        there.index_copy_(0, target_ids, blocks)


def _copy_to_gpu(pairs: Sequence[tuple[Tensor, Tensor]], source_ids: Tensor, target_ids: Tensor) -> None:
    """While one tensor's blocks travel, the next one's are gathered. Torch keeps pinned memory until its transfers are over."""
    for here, there in pairs:
        blocks = torch.empty((len(source_ids), *here.shape[1:]), dtype=here.dtype, pin_memory=True)
        torch.index_select(here, 0, source_ids, out=blocks)
        there.index_copy_(0, target_ids, blocks.to(there.device, non_blocking=True))


def _movable(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: torch does not gather them everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
