"""Linear layers over packed quantised weights with activations of 16 bits (or float32): which kernel for how many tokens.

    1                a GEMV                                         linear_gemv.py
    2 … 256          a GEMM that decodes on its way                 linear_gemm.py
    more             slices of the weight are decoded into memory and multiplied by cuBLAS: writing and reading 16-bit weights costs
                     about 0.6 ps a weight on an H200, a token 0.003 ps, so that from some 200 tokens on the faster product pays for it

The boundaries follow from that arithmetic, not from measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.triton.linear_gemm import gemm, new_counters
from penstock.execution.kernels.triton.linear_gemv import gemv
from penstock.execution.kernels.triton.linear_pack import GPUWeight
from penstock.execution.kernels.triton.linear_rows import dequantize_rows, dequantize_slice

MAX_GEMM_TOKENS = 256
# A slice that is written and read while it is still in the second-level cache.
SLICE_BYTES = 32 * 2**20


class TritonLinear:
    """y = x @ weight.T + bias with a weight that stays packed. Belongs to one stream at a time."""

    def __init__(self, weight: GPUWeight, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._counters = new_counters(weight.out_features, MAX_GEMM_TOKENS, weight.words.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] → [M, N] in the type of x. Raises IntegrityError for another shape."""
        if x.ndim != 2 or x.shape[1] != self.weight.in_features:
            raise IntegrityError(f"expected [M, {self.weight.in_features}], got {list(x.shape)}")
        output = x.new_empty(len(x), self.weight.out_features)
        if len(x) == 0:
            return output
        if self.weight.input_order is not None:
            x = x.index_select(1, self.weight.input_order)
        elif x.stride(1) != 1:
            x = x.contiguous()
        if len(x) == 1:
            gemv(x, self.weight, self.bias, output)
        elif len(x) <= MAX_GEMM_TOKENS:
            gemm(x, self.weight, self.bias, output, self._counters)
        else:
            self._multiply_decoded(x, output)
        return output

    def dequantize_rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, as for an embedding: ids int64 [T] → [T, K] in `dtype`."""
        return dequantize_rows(self.weight, ids, dtype)

    def _multiply_decoded(self, x: Tensor, output: Tensor) -> None:
        rows, columns = self.weight.out_features, self.weight.in_features
        step = max(1, SLICE_BYTES // (columns * x.element_size()))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            decoded = dequantize_slice(self.weight, start, stop, x.dtype)
            product = torch.nn.functional.linear(
                x, decoded, None if self.bias is None else self.bias[start:stop].to(x.dtype)
            )
            output[:, start:stop] = product


def linear_twin(x: Tensor, weight: GPUWeight, bias: Tensor | None) -> Tensor:
    """The product in torch's operators, float32."""
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    return torch.nn.functional.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
