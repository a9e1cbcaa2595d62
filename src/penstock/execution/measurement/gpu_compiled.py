"""Cases of the GPU benchmark: fragments of a layer as torch.compile makes them, beside our kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.kernels.triton import rows as kernels
from penstock.execution.measurement.gpu_rows import EPS
from penstock.execution.measurement.gpu_timing import (
    GPUCase,
    arithmetic_of,
    copies_for,
    relative_error,
    tolerance_of,
)

Fragment = Callable[..., Tensor]


def fragment_cases(
    sizes: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Iterator[GPUCase]:
    """Addition and norm, and an MLP, for widths (hidden, inner). compiled: references go through torch.compile, else run as written."""
    yield _norm_case(sizes[0], rows, dtype, device, _prepared(_add_norm, compiled=compiled))
    yield _mlp_case(sizes, rows, dtype, device, _prepared(_mlp, compiled=compiled))


def _norm_case(hidden: int, rows: int, dtype: torch.dtype, device: torch.device, reference: Fragment) -> GPUCase:
    nbytes = float(4 * rows * hidden * dtype.itemsize)
    copies = copies_for(nbytes)
    x, delta = (torch.randn(copies, rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, device=device).to(dtype) + 0.5
    return GPUCase(
        kernel="add_rms_norm",
        shape=f"{hidden}",
        rows=rows,
        bytes_moved=nbytes,
        operations=0.0,
        arithmetic=arithmetic_of(dtype),
        copies=copies,
        run=lambda copy: kernels.add_rms_norm(x[copy], delta[copy], weight, EPS),
        references={"torch.compile": lambda copy: reference(x[copy], delta[copy], weight)},
        error=lambda: relative_error(
            kernels.add_rms_norm(x[0].clone(), delta[0], weight, EPS), _add_norm(x[0].clone(), delta[0], weight)
        ),
        tolerance=tolerance_of(dtype),
    )


def _mlp_case(
    sizes: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device, reference: Fragment
) -> GPUCase:
    hidden, inner = sizes
    nbytes = float(3 * hidden * inner * dtype.itemsize)
    copies = copies_for(nbytes)
    x = torch.randn(rows, hidden, device=device).to(dtype)
    gate_up = [_weight(2 * inner, hidden, dtype, device) for _ in range(copies)]
    down = [_weight(hidden, inner, dtype, device) for _ in range(copies)]

    def ours(copy: int) -> Tensor:
        return F.linear(kernels.silu_and_mul(F.linear(x, gate_up[copy])), down[copy])

    return GPUCase(
        kernel="MLP",
        shape=f"{hidden} x {inner}",
        rows=rows,
        bytes_moved=nbytes + float(2 * rows * (hidden + 3 * inner) * dtype.itemsize),
        operations=6.0 * rows * hidden * inner,
        arithmetic=arithmetic_of(dtype),
        copies=copies,
        run=ours,
        references={
            "torch.compile": lambda copy: reference(x, gate_up[copy], down[copy]),
            "torch": lambda copy: _mlp(x, gate_up[copy], down[copy]),
        },
        error=lambda: relative_error(ours(0), _mlp(x.float(), gate_up[0].float(), down[0].float())),
        tolerance=2 * tolerance_of(dtype),
    )


def _prepared(fragment: Fragment, *, compiled: bool) -> Fragment:
    return torch.compile(fragment, dynamic=False) if compiled else fragment


def _add_norm(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    x += delta
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), EPS).to(x.dtype)


def _mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _weight(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device).mul_(columns**-0.5).to(dtype)
