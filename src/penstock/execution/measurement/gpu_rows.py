"""Cases of the GPU benchmark: kernels that read a row of activations and write one, beside torch's operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.kernels.triton import rows as kernels
from penstock.execution.measurement.gpu_timing import (
    GPUArithmetic,
    GPUCase,
    arithmetic_of,
    copies_for,
    relative_error,
    tolerance_of,
)

EPS = 1e-5


def row_cases(hidden: int, inner: int, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[GPUCase]:
    """Norm, addition and norm, gated activation over `rows` tokens of a model with these widths."""
    norm_bytes = float(2 * rows * hidden * dtype.itemsize)
    copies = copies_for(2 * norm_bytes)
    x = torch.randn(copies, rows, hidden, device=device).to(dtype)
    delta = torch.randn(copies, rows, hidden, device=device).to(dtype)
    weight = torch.rand(hidden, device=device).to(dtype) + 0.5
    arithmetic = arithmetic_of(dtype)
    yield GPUCase(
        kernel="rms_norm",
        shape=f"{hidden}",
        rows=rows,
        bytes_moved=norm_bytes,
        operations=0.0,
        arithmetic=arithmetic,
        copies=copies,
        run=lambda copy: kernels.rms_norm(x[copy], weight, EPS),
        references={"torch": lambda copy: F.rms_norm(x[copy], (hidden,), weight, EPS)},
        error=lambda: relative_error(kernels.rms_norm(x[0], weight, EPS), kernels.rms_norm_twin(x[0], weight, EPS)),
        tolerance=tolerance_of(dtype),
    )
    yield GPUCase(
        kernel="add_rms_norm",
        shape=f"{hidden}",
        rows=rows,
        bytes_moved=2 * norm_bytes,
        operations=0.0,
        arithmetic=arithmetic,
        copies=copies,
        run=lambda copy: kernels.add_rms_norm(x[copy], delta[copy], weight, EPS),
        references={"torch": lambda copy: F.rms_norm(x[copy].add_(delta[copy]), (hidden,), weight, EPS)},
        error=lambda: _add_norm_error(x[0], delta[0], weight),
        tolerance=tolerance_of(dtype),
    )
    yield from _silu_case(inner, rows, dtype, arithmetic, device)


def _silu_case(
    inner: int, rows: int, dtype: torch.dtype, arithmetic: GPUArithmetic, device: torch.device
) -> Iterator[GPUCase]:
    nbytes = float(3 * rows * inner * dtype.itemsize)
    copies = copies_for(nbytes)
    gate_up = torch.randn(copies, rows, 2 * inner, device=device).to(dtype)

    def torch_operators(copy: int) -> Tensor:
        gate, up = gate_up[copy].chunk(2, dim=-1)
        return F.silu(gate) * up

    yield GPUCase(
        kernel="silu_and_mul",
        shape=f"{inner}",
        rows=rows,
        bytes_moved=nbytes,
        operations=0.0,
        arithmetic=arithmetic,
        copies=copies,
        run=lambda copy: kernels.silu_and_mul(gate_up[copy]),
        references={"torch": torch_operators},
        error=lambda: relative_error(kernels.silu_and_mul(gate_up[0]), kernels.silu_and_mul_twin(gate_up[0])),
        tolerance=tolerance_of(dtype),
    )


def _add_norm_error(x: Tensor, delta: Tensor, weight: Tensor) -> float:
    """The larger of the errors of the sum and of its norm."""
    expected = (x.float() + delta.float()).to(x.dtype)
    total = x.clone()
    norm = kernels.add_rms_norm(total, delta, weight, EPS)
    return max(relative_error(total, expected), relative_error(norm, kernels.rms_norm_twin(expected, weight, EPS)))
