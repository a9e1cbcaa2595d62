"""torch's own product for 4-bit weights in groups (tinygemm on a GPU), as a candidate beside our kernels.

    weight[n, k] = (code - 8) * scale + zero

Scales and zeros are bfloat16 on a GPU, so that scales stored in float16 lose three bits; ours do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import QuantizedTensor

GROUPS = (32, 64, 128, 256)
# The layout's inner dimension is eight tiles of 16 input features.
_INNER_TILES = 8
_TILE = 16
_ROW_MULTIPLE = 16


class TorchInt4Linear:
    """y = x @ weight.T + bias; see `torch_int4_supports` for what it takes. x bfloat16 (on a CPU any float type)."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self._group = weight.group_size
        codes, scales = weight.codes.to(device), weight.scales.to(device)
        zeros = weight.zero_code * scales
        zeros = torch.zeros_like(zeros) if weight.offsets is None else zeros - weight.offsets.to(device)
        # [K / group, N, 2]
        self._parameters = torch.stack((scales, zeros), dim=-1).transpose(0, 1).to(dtype).contiguous()
        self._order = None if weight.input_order is None else weight.input_order.to(device)
        self._bias = None if bias is None else bias.to(device, dtype)
        if device.type == "cuda":
            # The even feature of a pair is in the upper half of its byte.
            pairs = codes[:, ::2] << 4 | codes[:, 1::2]
            self._codes = torch._convert_weight_to_int4pack(pairs.contiguous(), _INNER_TILES)
            self._product = torch._weight_int4pack_mm
        else:
            self._codes = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), _INNER_TILES)
            self._product = torch._weight_int4pack_mm_for_cpu

    @property
    def nbytes(self) -> int:
        tensors = (self._codes, self._parameters, self._order, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] → [M, N] in the type of x."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        x = x.contiguous() if self._order is None else x.index_select(1, self._order)
        output: Tensor = self._product(x, self._codes, self._group, self._parameters)
        return output if self._bias is None else output.add_(self._bias)


def torch_int4_supports(weight: QuantizedTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `TorchInt4Linear` can have this weight."""
    rows, columns = weight.shape
    shape = rows % _ROW_MULTIPLE == 0 and columns % (_INNER_TILES * _TILE) == 0
    fitting = weight.bits == 4 and weight.group_size in GROUPS and columns % weight.group_size == 0 and shape
    return fitting and (device.type == "cpu" or (dtype == torch.bfloat16 and hasattr(torch, "_weight_int4pack_mm")))
