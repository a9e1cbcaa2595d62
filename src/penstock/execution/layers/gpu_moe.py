"""The experts of a layer on a GPU, brought into one form and one piece of memory for the grouped product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from penstock.execution.kernels.moe import Routing
from penstock.execution.kernels.triton.linear import TritonLinear
from penstock.execution.kernels.triton.moe import GroupedExperts
from penstock.execution.kernels.triton.moe_gemm import GroupedFloats, GroupedWeight, group_codes
from penstock.execution.layers.linear import Linear, LinearKernel, PlainLinear


def grouped_experts(products: Mapping[int, tuple[Linear, Linear]], routing: Routing) -> GroupedExperts | None:
    """A grouped kernel for experts with consecutive numbers; None when their weights are not all of one form. Needs memory for one layer's
    experts once more while it is made; afterwards the single layers' kernels look into the grouped weights."""
    gate_up = _grouped([gate_up.kernel for gate_up, _ in products.values()])
    down = _grouped([down.kernel for _, down in products.values()]) if gate_up is not None else None
    if gate_up is None or down is None:
        return None
    return GroupedExperts(routing, next(iter(products)), len(products), gate_up, down)


def _grouped(kernels: Sequence[LinearKernel]) -> GroupedWeight | None:
    plain = [kernel for kernel in kernels if isinstance(kernel, PlainLinear)]
    packed = [kernel for kernel in kernels if isinstance(kernel, TritonLinear)]
    if len(plain) == len(kernels):
        floats = GroupedFloats(torch.stack([kernel.weight for kernel in plain]))
        for number, kernel in enumerate(plain):
            kernel.weight = floats.weights[number]
        return floats
    codes = group_codes([kernel.weight for kernel in packed]) if len(packed) == len(kernels) else None
    if codes is not None:
        for number, one in enumerate(packed):
            one.weight = codes.weight(number)
    return codes
