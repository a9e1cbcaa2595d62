"""One of two processes that check their collectives against each other: collective_rank.py RANK STORE NAME.

Prints one line per check that it has passed. In the end rank 1 dies without a word, and rank 0 prints how long it took to notice.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from penstock.execution.parallel.groups import Collectives
from penstock.execution.parallel.process_group import TorchCollectives, make_collectives
from penstock.execution.parallel.shared_memory import SLOT_BYTES, SharedMemoryCollectives, shared_memory_available

CPU = torch.device("cpu")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def numbers(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


def check_sums(rank: int, collectives: Collectives) -> None:
    # Short ones, and one that takes several rounds and ends in the middle of one.
    for shape in ((1, 2048), (3, 5), (1,), (3, SLOT_BYTES // 4 + 17)):
        tensor = numbers(rank, *shape)
        collectives.all_reduce(tensor)
        assert torch.equal(tensor, numbers(0, *shape) + numbers(1, *shape)), shape
    half = numbers(rank, 7, 9).to(torch.bfloat16)
    collectives.all_reduce(half)
    assert torch.equal(half, numbers(0, 7, 9).to(torch.bfloat16) + numbers(1, 7, 9).to(torch.bfloat16))
    columns = numbers(rank, 6, 8)
    collectives.all_reduce(columns[:, 2:4])
    assert torch.equal(columns[:, 2:4], (numbers(0, 6, 8) + numbers(1, 6, 8))[:, 2:4])
    assert torch.equal(columns[:, 4:], numbers(rank, 6, 8)[:, 4:])


def check_gathers(rank: int, collectives: Collectives) -> None:
    for shape in ((4, 3), (1,), (2, 2, 5), (2, SLOT_BYTES // 4 + 1)):
        gathered = collectives.all_gather(numbers(rank, *shape))
        assert torch.equal(gathered, torch.cat((numbers(0, *shape), numbers(1, *shape)), dim=-1)), shape
    ids = collectives.all_gather(torch.tensor([[rank]]))
    assert ids.tolist() == [[0, 1]]


def check_death(rank: int, collectives: Collectives) -> None:
    """Rank 1 is killed while rank 0 waits for it."""
    if rank == 1:
        say("dying")
        os.kill(os.getpid(), signal.SIGKILL)
    tensor = torch.ones(4)
    start = time.monotonic()
    try:
        collectives.all_reduce(tensor)
    except RuntimeError as error:
        say(f"noticed after {time.monotonic() - start:.3f} s: {error}")


def main(rank: int, file: str, name: str) -> None:
    store = dist.FileStore(file, 2)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    gloo = make_collectives(rank, 2, device=CPU, group=group, shared=None)
    assert isinstance(gloo, TorchCollectives)
    shared = make_collectives(rank, 2, device=CPU, group=group, shared=name)
    assert isinstance(shared, SharedMemoryCollectives) == shared_memory_available()
    for collectives in (gloo, shared):
        check_sums(rank, collectives)
        check_gathers(rank, collectives)
        say(type(collectives).__name__)
    check_death(rank, shared)
    # Nothing is left to say goodbye to.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
