"""Blocks that a step moves: within the device (copy on write), to the host tier and back. Queued like all other work of a step.

A later step may read the host blocks that an earlier one fills: both do it on the device, in the order of the queue. The host itself never
looks into them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.attention.backend import KVCache
from penstock.execution.kernels.triton.block_moves import ALIGNMENT, move_blocks


class BlockMover:
    """Moves blocks of the KV caches of all layers and of the host's, which are pinned where the device is a GPU (none without a host tier).

    Raises IntegrityError for caches that the device cannot reach or whose blocks cannot be moved in pieces of 16 bytes.
    """

    def __init__(self, kv_caches: list[KVCache], host_caches: list[KVCache], device: torch.device) -> None:
        # The tables have addresses; this keeps the memory behind them.
        self._tensors = [tensor for cache in [*kv_caches, *host_caches] for tensor in cache.tensors]
        here = [tensor for cache in kv_caches for tensor in cache.tensors]
        there = [tensor for cache in host_caches for tensor in cache.tensors]
        for tensor in self._tensors:
            _check(tensor, device)
        sizes = [tensor[0].nbytes // ALIGNMENT for tensor in here]
        if there and sizes != [tensor[0].nbytes // ALIGNMENT for tensor in there]:
            raise IntegrityError("blocks of the host tier have another size than those of the device")
        self._largest = max(sizes, default=0)
        self._sizes = torch.tensor(sizes, dtype=torch.int32).to(device)
        self._device_table = _addresses(here, device)
        self._host_table = _addresses(there, device)

    def copy(self, moves: Tensor) -> None:
        """Within the device; moves: int32 [M, 2] on the device, sources and targets. No block is both."""
        self._move(self._device_table, self._device_table, moves)

    def swap_out(self, moves: Tensor) -> None:
        """From the device to the host tier."""
        self._move(self._device_table, self._host_table, moves)

    def swap_in(self, moves: Tensor) -> None:
        """From the host tier to the device."""
        self._move(self._host_table, self._device_table, moves)

    def _move(self, sources: Tensor, targets: Tensor, moves: Tensor) -> None:
        if not len(sources) == len(targets) == len(self._sizes):
            raise IntegrityError("a step moves blocks to or from a host tier that does not exist")
        move_blocks(sources, targets, self._sizes, self._largest, moves)


def _check(tensor: Tensor, device: torch.device) -> None:
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT or tensor[0].nbytes % ALIGNMENT:
        raise IntegrityError(
            f"a KV cache of shape {tuple(tensor.shape)} cannot be moved in pieces of {ALIGNMENT} bytes"
        )
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        raise IntegrityError("the host tier is not pinned, so that the device cannot reach it")


def _addresses(tensors: list[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(device)
