"""Mixtures of experts on a CPU: each token goes to a few of many gated feed-forward blocks, the experts (Shazeer et al., 2017,
arXiv:1701.06538).

    logits [T, E] ── softmax ── the k largest shares of each token ── pairs of token and expert, put in order by expert
        pairs' tokens ── gate_up of their expert ── silu(gate) * up ── down of their expert ── weighted sum for each token

NativeExperts does all of it in one native call (csrc/moe.cpp), `route` and `experts_twin` in plain torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.native import library
from penstock.execution.kernels.rows import silu_and_mul_twin


@dataclass(frozen=True)
class Routing:
    """How tokens choose. per_token: experts of one token. renormalize: their weights add up to one; otherwise they are shares of all."""

    num_experts: int
    per_token: int
    renormalize: bool


@dataclass(frozen=True)
class ExpertKernels:
    """One expert's products: gate_up x [M, H] → [M, 2 * I], the gate first; down [M, I] → [M, H]."""

    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits [T, E] → weights float32 [T, k], the largest first, and the experts that they belong to, int64 [T, k]."""
    weights, experts = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), routing.per_token, dim=-1)
    if routing.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def experts_twin(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    experts: Mapping[int, ExpertKernels],
    silu_and_mul: Callable[[Tensor], Tensor] = silu_and_mul_twin,
) -> Tensor:
    """x [T, H], and what `route` gives → the weighted sum of the outputs of a token's experts, [T, H]. Experts that are not in `experts`
    count as zero. Each is computed once, for all of its tokens."""
    output = torch.zeros_like(x)
    for number in torch.unique(chosen).tolist():
        if number not in experts:
            continue
        tokens, places = torch.where(chosen == number)
        result = experts[number].down(silu_and_mul(experts[number].gate_up(x[tokens])))
        output.index_add_(0, tokens, (result * weights[tokens, places].unsqueeze(1)).to(x.dtype))
    return output


class _ExpertStruct(ctypes.Structure):
    _fields_ = [("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p)]


class ExpertsStruct(ctypes.Structure):
    """ExpertLayer in csrc/moe.h."""

    _fields_ = [
        ("num_experts", ctypes.c_int32),
        ("first_expert", ctypes.c_int32),
        ("num_present", ctypes.c_int32),
        ("per_token", ctypes.c_int32),
        ("renormalize", ctypes.c_int32),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("experts", ctypes.POINTER(_ExpertStruct)),
    ]


class NativeExperts:
    """Consecutive experts of a layer, from number `first` on, as one native kernel; there may be none. Holds their weights. `struct`
    (ExpertLayer in csrc/moe.h) points into them and lives as long as this object.

    A token's result is bitwise the same whatever other tokens are computed with it and on however many threads. Only the weights of
    experts that some token goes to are read.
    """

    def __init__(
        self,
        routing: Routing,
        first: int,
        experts: Sequence[tuple[NativeLinear, NativeLinear]],
        hidden_size: int,
        intermediate_size: int,
    ) -> None:
        wanted = (hidden_size, 2 * intermediate_size, intermediate_size, hidden_size)
        for gate_up, down in experts:
            if (gate_up.in_features, gate_up.out_features, down.in_features, down.out_features) != wanted:
                raise IntegrityError(f"an expert is not of the sizes {hidden_size} and {intermediate_size}")
        self._routing = routing
        self._hidden_size = hidden_size
        structs = (_ExpertStruct * len(experts))(
            *(_ExpertStruct(ctypes.addressof(one.struct), ctypes.addressof(other.struct)) for one, other in experts)
        )
        self._kept_alive = (list(experts), structs)
        self.struct = ExpertsStruct(
            routing.num_experts,
            first,
            len(experts),
            routing.per_token,
            int(routing.renormalize),
            hidden_size,
            intermediate_size,
            structs,
        )
        self._function = _function()

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """x float32 [T, H] and the router's logits float32 [T, E] → float32 [T, H]. Raises MemoryError without room for activations."""
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self._hidden_size:
            raise IntegrityError(f"expected float32 [T, {self._hidden_size}], got {x.dtype} {tuple(x.shape)}")
        if logits.dtype != torch.float32 or logits.shape != (len(x), self._routing.num_experts):
            raise IntegrityError(f"expected float32 [T, {self._routing.num_experts}] logits, got {tuple(logits.shape)}")
        x, logits = x.contiguous(), logits.contiguous()
        output = torch.empty_like(x)
        status = self._function(
            ctypes.byref(self.struct), x.data_ptr(), logits.data_ptr(), len(x), output.data_ptr(), 0
        )
        if status:
            raise MemoryError(f"no memory for the activations of {len(x)} tokens in a mixture of experts")
        return output


@cache
def _function() -> Any:
    function = library().penstock_experts
    address = ctypes.c_void_p
    function.argtypes = [ctypes.POINTER(ExpertsStruct), address, address, ctypes.c_int64, address, ctypes.c_int32]
    function.restype = ctypes.c_int32
    return function
