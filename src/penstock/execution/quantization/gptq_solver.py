"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): rounds a weight column by column, and lets the columns that are still to come make up
for the error of those that are done.

    H = E[x xᵀ] + damping                                     [K, K], of the inputs x
    U = upper Cholesky factor of H⁻¹                          row k: how the columns after k answer to an error in column k
    for each column k:     e = (w_k - Q(w_k)) / U[k, k]
                           w_j -= e * U[k, j]   for j > k

Columns of a block are updated at once, those behind the block when it is done ("lazy batch updates").
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.quantization.awq_search import GroupLoss, round_to_codes, search_scales

# Columns between two updates of all the rest; the paper's.
_BLOCK = 128

# The damping is multiplied by the first of these with which the moment is positive definite in float32.
_DAMPING_FACTORS = (1.0, 10.0, 100.0)


def solve_gptq(
    weight: Tensor,
    moment: Tensor,
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    damping: float = 0.01,
    activation_order: bool = False,
) -> QuantizedTensor:
    """Quantise float32 [N, K] for inputs of second moment float32 [K, K], symmetric, a scale per `group_size` input features.

    Scales are searched when a group's turn comes, from the weights as they are then. With `activation_order`, columns go by the
    strength of their input, strongest first, and scales are those of the original weight ("static groups"): groups stay contiguous, so
    the result has no input order either way. `damping` is a share of the mean of the moment's diagonal. Raises IntegrityError when
    `moment` is not finite.
    """
    columns = weight.shape[1]
    order = moment.diagonal().argsort(descending=True) if activation_order else torch.arange(columns)
    factor = inverse_factor(moment[order][:, order], damping)
    # An error in column k costs (error / U[k, k])² once the columns behind it have answered.
    importance = torch.empty(columns).index_copy_(0, order, factor.diagonal() ** -2).view(-1, group_size)
    scales = torch.empty(weight.shape[0], columns // group_size)
    if activation_order:
        scales = search_scales(weight.view(weight.shape[0], -1, group_size), bits, scale_dtype, _weighted(importance))
    rest = weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    block = max(_BLOCK // group_size, 1) * group_size
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(weight.shape[0], end - start)
        for position in range(start, end):
            feature = int(order[position])
            group = feature // group_size
            if not activation_order and feature % group_size == 0:
                current = rest[:, feature : feature + group_size].unsqueeze(1)
                loss = _weighted(importance[group : group + 1])
                scales[:, group] = search_scales(current, bits, scale_dtype, loss).squeeze(1)
            column, scale = rest[:, position], scales[:, group]
            code = round_to_codes(column.view(-1, 1), scale, bits).view(-1)
            codes[:, feature] = code.to(torch.uint8)
            error = (column - (code - (1 << (bits - 1))) * scale) / factor[position, position]
            errors[:, position - start] = error
            rest[:, position + 1 : end] -= torch.outer(error, factor[position, position + 1 : end])
        rest[:, end:] -= errors @ factor[start:end, end:]
    return QuantizedTensor(codes=codes, bits=bits, group_size=group_size, scales=scales)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U, upper triangular float32 [K, K], with (moment + damping) ** -1 = Uᵀ U. Raises IntegrityError when `moment` is not finite."""
    if not torch.isfinite(moment).all():
        raise IntegrityError("The second moment of a layer's inputs is not finite.")
    # Inputs that never occurred have a zero on the diagonal. An all-zero moment says nothing: every column for itself.
    mean = float(moment.diagonal().mean()) or 1.0
    for factor in _DAMPING_FACTORS:
        damped = moment + torch.eye(moment.shape[0]) * (mean * damping * factor)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise IntegrityError(
        "The second moment of a layer's inputs is not positive definite, whatever is added to its diagonal."
    )


def _weighted(importance: Tensor) -> GroupLoss:
    """Squared errors times importance [G, g]."""
    return lambda errors: (errors.square() * importance).sum(-1)
