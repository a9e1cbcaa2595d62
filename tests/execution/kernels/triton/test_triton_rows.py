"""Kernels over rows against their twins."""

from __future__ import annotations

import pytest
import torch

from penstock.execution.kernels.triton import rows

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 2048])
def test_norm(dtype: torch.dtype, size: int, device: torch.device) -> None:
    torch.manual_seed(size)
    x, delta = torch.randn(2, 5, size, device=device).to(dtype).unbind()
    weight = torch.rand(size, device=device).to(dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        rows.rms_norm(x, weight, 1e-5), rows.rms_norm_twin(x, weight, 1e-5), rtol=tolerance, atol=tolerance
    )
    total = (x.float() + delta.float()).to(dtype)
    normalised = rows.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(x, total)
    torch.testing.assert_close(normalised, rows.rms_norm_twin(total, weight, 1e-5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 1500])
def test_gated_activation(dtype: torch.dtype, size: int, device: torch.device) -> None:
    gate_up = torch.randn(4, 2 * size, device=device).to(dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        rows.silu_and_mul(gate_up), rows.silu_and_mul_twin(gate_up), rtol=tolerance, atol=tolerance
    )
