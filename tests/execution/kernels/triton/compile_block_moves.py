"""Compiles the kernel of block_moves.py for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch

from penstock.execution.kernels.triton.block_moves import move_blocks
from penstock.testing.triton_compile import check_resources, compile_only


def compile_kernels(capability: int) -> None:
    addresses, sizes = torch.empty(64, dtype=torch.int64), torch.empty(64, dtype=torch.int32)
    with compile_only(capability) as compiled:
        for count in (1, 16):
            move_blocks(addresses, addresses, sizes, 8192, torch.empty(count, 2, dtype=torch.int32))
    check_resources(compiled)
    (ptx,) = {kernel.ptx for kernel in compiled}
    assert "ld.global.v4" in ptx, ptx
    assert "st.global.v4" in ptx, ptx
