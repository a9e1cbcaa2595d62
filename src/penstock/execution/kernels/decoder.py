"""The native decoder's C structures (csrc/decoder.cpp), and a handle that keeps alive what they point to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.attention import KVCacheStruct
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.moe import NativeExperts
from penstock.execution.kernels.native import library, pointer
from penstock.execution.kernels.rank_sum import RankSum

_SUM_FAILED = 2


class _LayerStruct(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("router", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("sliding_window", ctypes.c_int32),
    ]


class _SpecStruct(ctypes.Structure):
    _fields_ = [
        ("num_layers", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
        ("final_norm", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_LayerStruct)),
        ("all_reduce", ctypes.c_void_p),
        ("reduce_context", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
    ]


class StepStruct(ctypes.Structure):
    """DecoderStep in csrc/decoder.cpp."""

    _fields_ = [
        ("num_tokens", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("caches", ctypes.POINTER(KVCacheStruct)),
        ("num_requests", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("kv_kind", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class DecoderLayerWeights:
    """One layer. Norm weights are float32; q_norm and k_norm are None where heads are not normalised.

    feed_forward: gate_up and down, or a router and its experts.
    """

    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: NativeLinear
    o: NativeLinear
    feed_forward: tuple[NativeLinear, NativeLinear] | tuple[NativeLinear, NativeExperts]
    sliding_window: int | None


class DecoderHandle:
    """A stack of layers in C++. Holds the weights that it points to; not thread-safe.

    final_norm: None where another process has it. Heads and intermediate_size, the largest of dense layers, are those of this rank;
    rank_sum: None when there is one.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayerWeights],
        final_norm: Tensor | None,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        intermediate_size: int,
        norm_eps: float,
        rank_sum: RankSum | None = None,
    ) -> None:
        self._kept_alive = (list(layers), final_norm)
        self._rank_sum = rank_sum
        structs = (_LayerStruct * len(layers))(*(_layer_struct(layer) for layer in layers))
        self._structs = structs
        spec = _SpecStruct(
            num_layers=len(layers),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            norm_eps=norm_eps,
            final_norm=pointer(final_norm),
            layers=structs,
            all_reduce=None if rank_sum is None else rank_sum.function,
            reduce_context=None if rank_sum is None else rank_sum.context,
            rank=0 if rank_sum is None else rank_sum.rank,
        )
        native = library()
        native.penstock_decoder_create.restype = ctypes.c_void_p
        native.penstock_decoder_create.argtypes = [ctypes.POINTER(_SpecStruct)]
        native.penstock_decoder_destroy.argtypes = [ctypes.c_void_p]
        native.penstock_decoder_forward.argtypes = [ctypes.c_void_p, ctypes.POINTER(StepStruct)]
        self._destroy = native.penstock_decoder_destroy
        self._forward = native.penstock_decoder_forward
        self._handle = native.penstock_decoder_create(ctypes.byref(spec))
        if not self._handle:
            raise MemoryError("no memory for the native decoder")

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self._destroy(handle)

    def forward(self, step: StepStruct) -> None:
        """Run the stack. Raises MemoryError when there is no room for this step's activations, and what summing over ranks raises."""
        status = self._forward(self._handle, ctypes.byref(step))
        if status == 1:
            raise MemoryError(f"no memory for the activations of {step.num_tokens} tokens")
        if status == _SUM_FAILED and self._rank_sum is not None:
            raise self._rank_sum.failure(status)
        if status:
            raise IntegrityError(f"the native decoder answered {status}")


def _layer_struct(layer: DecoderLayerWeights) -> _LayerStruct:
    first, second = (ctypes.addressof(part.struct) for part in layer.feed_forward)
    mixture = isinstance(layer.feed_forward[1], NativeExperts)
    return _LayerStruct(
        input_norm=pointer(layer.input_norm),
        post_attention_norm=pointer(layer.post_attention_norm),
        q_norm=pointer(layer.q_norm),
        k_norm=pointer(layer.k_norm),
        qkv=ctypes.addressof(layer.qkv.struct),
        o=ctypes.addressof(layer.o.struct),
        gate_up=None if mixture else first,
        down=None if mixture else second,
        router=first if mixture else None,
        experts=second if mixture else None,
        sliding_window=layer.sliding_window or 0,
    )
