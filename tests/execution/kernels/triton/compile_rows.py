"""Compiles the kernels of rows.py for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch

from penstock.execution.kernels.triton import rows
from penstock.testing.triton_compile import check_resources, compile_only


def compile_kernels(capability: int) -> None:
    with compile_only(capability) as compiled:
        for dtype in (torch.bfloat16, torch.float16):
            for size in (576, 2048, 8192):
                x, weight = torch.empty(3, size, dtype=dtype), torch.empty(size, dtype=dtype)
                rows.rms_norm(x, weight, 1e-5)
                rows.add_rms_norm(x, x.clone(), weight, 1e-5)
            rows.silu_and_mul(torch.empty(3, 2 * 5632, dtype=dtype))
    check_resources(compiled)
