"""How the ranks of a group really add up and gather: torch.distributed anywhere, shared memory where all of them are on one machine.

ranks on one machine, CPU      SharedMemoryCollectives: no system call unless a rank is late
ranks on several machines      TorchCollectives over gloo
GPUs                           TorchCollectives over NCCL, which can be recorded into a graph
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.execution.parallel.groups import Collectives

# The name that torch has for it since 2.13; the older one is deprecated there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def make_collectives(
    rank: int, size: int, *, device: torch.device, group: dist.ProcessGroup, shared: str | None
) -> Collectives:
    """How rank `rank` of `size` ranks works with the others; all of them call this at the same time.

    group: their process group, in which this process has the same rank; gloo for a CPU, nccl for GPUs. shared: when all ranks are
    processes of one machine, a name that no other group on the machine has, at most 64 letters, digits and '-', the same on every rank;
    None when they are on several machines. Raises RuntimeError when a rank is gone.
    """
    if size < 2:
        raise ValueError("one rank needs no collectives")
    if device.type == "cpu" and shared is not None:
        from penstock.execution.parallel.shared_memory import SharedMemoryCollectives, shared_memory_available

        if shared_memory_available():
            return SharedMemoryCollectives.join(shared, rank, size, barrier=lambda: dist.barrier(group))
    return TorchCollectives(group, size)


class TorchCollectives:
    """Collectives over a process group of torch. Raises RuntimeError (torch's DistBackendError is one) when a rank is gone.

    With three ranks or more, gloo adds them up in an order that depends on an element's place in the tensor, so that a token's result would
    depend on its company. There everybody gathers all parts and adds them up in the order of ranks.
    """

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self._group = group
        self._size = size
        self._sums_in_order = size > 2 and dist.get_backend(group) == "gloo"

    def all_reduce(self, tensor: Tensor) -> None:
        data = tensor.contiguous()
        if self._sums_in_order:
            parts = self._gathered(data)
            data = parts[0]
            for part in parts[1:]:
                data.add_(part)
        else:
            dist.all_reduce(data, group=self._group)
        if data is not tensor:
            tensor.copy_(data)

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = self._gathered(tensor.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """[size, *tensor.shape]"""
        parts = torch.empty((self._size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        # As vectors: gloo wants the parts along the first dimension, NCCL takes anything.
        _all_gather_single(parts.view(-1), tensor.view(-1), group=self._group)
        return parts
