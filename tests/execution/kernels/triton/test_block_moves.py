"""Moves of whole blocks against their twin."""

from __future__ import annotations

import torch

from penstock.execution.kernels.triton.block_moves import ALIGNMENT, move_blocks, move_blocks_twin


def test_blocks_of_several_tensors(device: torch.device) -> None:
    """Tensors with blocks of different sizes, one of them more than a program moves."""
    torch.manual_seed(0)
    shapes = [(7, 16, 3, 16), (7, 4096 + 4), (7, 4)]
    sources = [torch.randn(shape, device=device) for shape in shapes]
    # As of the host tier, which a GPU reaches through the bus.
    targets = [torch.randn(shape, pin_memory=device.type == "cuda") for shape in shapes]
    expected = [target.clone() for target in targets]
    moves = torch.tensor([[6, 0], [2, 5], [2, 3]], dtype=torch.int32, device=device)
    sizes = [tensor[0].nbytes // ALIGNMENT for tensor in sources]
    here, there = (
        torch.tensor([tensor.data_ptr() for tensor in tensors], device=device) for tensors in (sources, targets)
    )
    move_blocks(here, there, torch.tensor(sizes, dtype=torch.int32, device=device), max(sizes), moves)
    move_blocks_twin(sources, expected, moves)
    if device.type == "cuda":
        torch.cuda.synchronize()
    for target, other, source in zip(targets, expected, sources, strict=True):
        assert torch.equal(target, other)
        assert torch.equal(target[5], source[2].cpu())
