"""How the ranks of an engine find each other: torch's process groups, over a store that the first rank opens.

The store listens on a port that the system chooses and on one address only, so that several engines share a machine and a loopback address
stays one. All traffic goes through the interface that has that address. Who can reach it there is trusted: torch's groups know no keys.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from penstock.core.errors import IntegrityError
from penstock.execution.parallel.groups import ModelPart, PipelineStage, TensorParallel
from penstock.execution.parallel.process_group import make_collectives
from penstock.execution.runner.rank_messages import Start
from penstock.execution.runner.worker import Place

# So long ranks wait for each other: at the start one may still import, later nothing else would say that a rank hangs.
_TIMEOUT = timedelta(minutes=30)


class Rendezvous:
    """This process's way into process groups, one model after another. The store of a first rank stays for the next model."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None

    def open_store(self, address: str) -> str:
        """Open the store, if it is not open, and say where it is: HOST:PORT. For the first rank."""
        if self._store is None:
            with socket.create_server((address, 0)) as listener:
                port = int(listener.getsockname()[1])
                self._store = TCPStore(
                    address,
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=listener.detach(),
                    timeout=_TIMEOUT,
                )
        return f"{address}:{self._store.port}"

    def join(self, start: Start, address: str, device: torch.device) -> tuple[ModelPart, Place]:
        """Wait for all ranks, and make the groups that the parts of this start need; what this rank holds, and its neighbours."""
        self._make_group(start, address, device)
        size, stages = start.settings.tensor_parallel_size, start.settings.pipeline_parallel_size
        index, tensor_rank = divmod(start.rank, size)
        stage = PipelineStage(index, stages)
        place = Place(
            start.local_rank,
            start.local_ranks,
            previous=None if stage.is_first else start.rank - size,
            next=None if stage.is_last else start.rank + size,
        )
        if size == 1:
            return ModelPart(stage=stage), place
        # Every rank has to make every group, also those that it is not in.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, size * stages, size)]
        group = groups[index]
        if not isinstance(group, dist.ProcessGroup):
            raise IntegrityError("a rank is not in the group of its stage")
        shared = f"{start.run}-{index}" if start.one_machine else None
        collectives = make_collectives(tensor_rank, size, device=device, group=group, shared=shared)
        return ModelPart(TensorParallel(tensor_rank, size, collectives), stage), place

    def leave(self) -> None:
        """Leave the groups. Idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _make_group(self, start: Start, address: str, device: torch.device) -> None:
        if (interface := _interface_of(address)) is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        store = self._store
        if start.rank or store is None:
            host, _, port = start.store.rpartition(":")
            store = TCPStore(host, int(port), is_master=False, timeout=_TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # Names of an earlier start must not be found.
            store=PrefixStore(start.run, store),
            rank=start.rank,
            world_size=start.settings.num_ranks,
            timeout=_TIMEOUT,
        )


def _interface_of(address: str) -> str | None:
    """The name of the network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
