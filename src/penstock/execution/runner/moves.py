"""Block moves of a step, in the order that engine/step.py gives."""

from __future__ import annotations

import torch

from penstock.engine.step import SchedulerOutput
from penstock.execution.attention.backend import AttentionBackend, KVCache


def move_blocks(
    step: SchedulerOutput,
    backend: AttentionBackend,
    kv_caches: list[KVCache],
    host_caches: list[KVCache],
    device: torch.device,
) -> None:
    """Move whole blocks in all layers' caches: device to host, host to device, device to device."""
    if step.swap_outs:
        backend.swap_out(kv_caches, host_caches, step.swap_outs)
    if step.swap_ins:
        backend.swap_in(kv_caches, host_caches, step.swap_ins)
    if step.block_copies:
        pairs = torch.tensor([(move.source, move.target) for move in step.block_copies], dtype=torch.int64)
        source, target = pairs.to(device).unbind(1)
        backend.copy_blocks(kv_caches, source, target)
