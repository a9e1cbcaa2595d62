"""Work on single rows: RMSNorm, SiLU, rotation, and keys and values on their way into the cache (csrc/rows.h), each with its twin."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.kernels.attention import TILE_TOKENS, KVCacheStruct
from penstock.execution.kernels.native import library


class RotaryStruct(ctypes.Structure):
    """RotaryCall in csrc/kernels.h."""

    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("positions", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
        ("slot_mapping", ctypes.c_void_p),
        ("kv_kind", ctypes.c_int32),
        ("cache", KVCacheStruct),
    ]


_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "penstock_rms_norm": [_POINTER, _INT64, _POINTER, ctypes.c_float, _POINTER, _INT64, _INT64],
    "penstock_silu_and_mul": [_POINTER, _POINTER, _INT64, _INT64],
    "penstock_rotary_and_write": [ctypes.POINTER(RotaryStruct), _INT64],
    "penstock_kv_write": [ctypes.POINTER(RotaryStruct), _POINTER, _INT64, _POINTER, _INT64, _INT64],
}


@cache
def _function(name: str) -> Any:
    function = getattr(library(), name)
    function.argtypes = _ARGUMENTS[name]
    function.restype = None
    return function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x float32 [..., features], contiguous in the last dimension, and weight float32 [features] → the same shape."""
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    output = torch.empty(x.shape, dtype=torch.float32)
    _function("penstock_rms_norm")(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, output.data_ptr(), rows.shape[0], rows.shape[1]
    )
    return output


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up float32 [..., 2 * features], the gate first → silu(gate) * up."""
    gate_up = gate_up.contiguous()
    features = gate_up.shape[-1] // 2
    output = torch.empty((*gate_up.shape[:-1], features), dtype=torch.float32)
    _function("penstock_silu_and_mul")(
        gate_up.data_ptr(), output.data_ptr(), gate_up.numel() // max(1, 2 * features), features
    )
    return output


def silu_and_mul_twin(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary_and_write(call: RotaryStruct, tokens: int) -> None:
    """Normalise, rotate and write the keys and values of `tokens` tokens; see RotaryCall in csrc/kernels.h."""
    _function("penstock_rotary_and_write")(ctypes.byref(call), tokens)


def rotary_twin(qkv: Tensor, heads: int, cos_sin: Tensor) -> Tensor:
    """Rotate the first `heads` heads of qkv [T, all heads, D] by cos_sin [T, D]: D/2 cosines, then D/2 sines."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = qkv[:, :heads].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, qkv[:, heads:]), dim=1)


def kv_write(call: RotaryStruct, key: Tensor, value: Tensor) -> None:
    """Write key and value float32 [T, KVH, D], contiguous within a token, at the call's slots. Only the call's sizes, slots and cache
    are read."""
    _function("penstock_kv_write")(
        ctypes.byref(call), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0), len(key)
    )


def kv_write_twin(tiles: Tensor, scales: Tensor | None, rows: Tensor, slots: Tensor, *, keys: bool) -> None:
    """Write rows float32 [T, KVH, D] into the tiled keys (or values), rounded as the cache's type wants.

    int8: code = x * 127 / largest, scale = largest / 127, with the largest magnitude of the token's head.
    """
    block_size = tiles.shape[2] * TILE_TOKENS
    block, offset = slots // block_size, slots % block_size
    stored = rows.to(tiles.dtype)
    if scales is not None:
        largest = rows.abs().amax(-1, keepdim=True)
        factor = torch.where(largest > 0, 127 / largest, 0.0)
        stored = (rows * factor).round().to(torch.int8)
        scales[block, :, offset] = (largest / 127).squeeze(-1)
    if keys:
        tiles[block, :, offset // TILE_TOKENS, :, offset % TILE_TOKENS] = stored
    else:
        tiles[block, :, offset // TILE_TOKENS, offset % TILE_TOKENS] = stored
