"""Runs the layers of a model whose weights, attention and arithmetic are all native as one call into C++.

The modules stay what they are: they hold the weights and define the model. Where they can all be expressed by the native decoder
(csrc/decoder.cpp), it computes the same thing, kernel by kernel, without returning to Python in between. A model says that its
layers are of that kind with `CausalLM.native_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from penstock.execution.attention.backend import KVCache
from penstock.execution.attention.context import get_forward_context
from penstock.execution.attention.native_paged import NativePagedAttention, cache_struct
from penstock.execution.kernels.attention import KV_KINDS, KVCacheStruct
from penstock.execution.kernels.decoder import DecoderHandle, DecoderLayerWeights, StepStruct
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.moe import NativeExperts
from penstock.execution.kernels.rank_sum import RankSum, callback_sum
from penstock.execution.layers.moe import MixtureOfExperts
from penstock.execution.layers.rotary import RotaryEmbedding
from penstock.execution.models.config import ModelConfig
from penstock.execution.parallel.groups import TensorParallel
from penstock.execution.parallel.sharding import local_heads


@runtime_checkable
class NativelySumming(Protocol):
    """Collectives whose sum C++ can call by itself."""

    def rank_sum(self) -> RankSum: ...


class NativeDecoder:
    """The layers of one model, or of one stage of it, and the final norm where that is in this process."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[DecoderLayerWeights],
        norm: Tensor | None,
        rotary: RotaryEmbedding,
        tensor: TensorParallel,
    ) -> None:
        self._rotary = rotary
        self._has_norm = norm is not None
        num_heads, num_kv_heads = local_heads(config.num_heads, config.num_kv_heads, tensor.rank, tensor.size)
        self._handle = DecoderHandle(
            layers,
            norm,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=max((_inner_size(layer) for layer in layers), default=0),
            norm_eps=config.rms_norm_eps,
            rank_sum=_rank_sum(tensor),
        )
        self._step = StepStruct()
        self._kv_caches: list[KVCache] | None = None
        self._cache_structs: object = None

    def __call__(self, residual: Tensor, positions: Tensor) -> Tensor:
        """Embeddings float32 [T, hidden_size], or the residual of the stage before, which are overwritten, and positions int64 [T] →
        normalised hidden states, the same shape; without a norm, the residual. Inside a forward context."""
        context = get_forward_context()
        attention = context.attention
        if self._kv_caches is not context.kv_caches:
            self._take_caches(context.kv_caches)
        table = self._rotary.table(attention.max_seq_len)
        residual = residual.contiguous()
        hidden = torch.empty_like(residual) if self._has_norm else residual
        step = self._step
        step.num_tokens = len(residual)
        step.residual = residual.data_ptr()
        step.hidden = hidden.data_ptr()
        step.positions = positions.data_ptr()
        step.cos_sin = table.data_ptr()
        step.slot_mapping = attention.slot_mapping.data_ptr()
        step.query_start = attention.query_start.data_ptr()
        step.seq_lens = attention.seq_lens.data_ptr()
        step.block_tables = attention.block_tables.data_ptr()
        step.block_table_stride = attention.block_tables.stride(0)
        step.num_requests = attention.num_requests
        self._handle.forward(step)
        return hidden

    def _take_caches(self, kv_caches: list[KVCache]) -> None:
        """The caches stay where they are for as long as the runner uses the same list."""
        structs = (KVCacheStruct * len(kv_caches))(*(cache_struct(cache) for cache in kv_caches))
        self._cache_structs = structs
        self._step.caches = structs
        self._step.block_size = kv_caches[0].block_size
        self._step.kv_kind = KV_KINDS[kv_caches[0].key.dtype]
        self._kv_caches = kv_caches


def native_decoder(
    config: ModelConfig,
    layers: Sequence[nn.Module],
    norm: Tensor | None,
    rotary: RotaryEmbedding,
    tensor: TensorParallel,
) -> NativeDecoder | None:
    """A native decoder for these layers; None when a product or the attention is not native. The layers have DecoderLayer's parts."""
    weights = [_layer_weights(layer) for layer in layers]
    known = [layer for layer in weights if layer is not None]
    return NativeDecoder(config, known, norm, rotary, tensor) if len(known) == len(weights) else None


def _inner_size(layer: DecoderLayerWeights) -> int:
    """Of a dense block; 0 for a mixture of experts."""
    down = layer.feed_forward[1]
    return down.in_features if isinstance(down, NativeLinear) else 0


def _rank_sum(tensor: TensorParallel) -> RankSum | None:
    collectives = tensor.collectives
    if collectives is None:
        return None
    if isinstance(collectives, NativelySumming):
        return collectives.rank_sum()
    return callback_sum(tensor.rank, collectives.all_reduce)


def _layer_weights(layer: nn.Module) -> DecoderLayerWeights | None:
    attention = layer.get_submodule("self_attn")
    projections = _native_kernels(attention, "qkv_proj", "o_proj")
    feed_forward = _feed_forward(layer.get_submodule("mlp" if hasattr(layer, "mlp") else "block_sparse_moe"))
    paged_attention = attention.get_submodule("attn")
    native_attention = isinstance(getattr(paged_attention, "backend", None), NativePagedAttention)
    if projections is None or feed_forward is None or not native_attention:
        return None
    qkv, o = projections
    return DecoderLayerWeights(
        input_norm=_norm_weight(layer, "input_layernorm"),
        post_attention_norm=_norm_weight(layer, "post_attention_layernorm"),
        q_norm=_norm_weight(attention, "q_norm") if hasattr(attention, "q_norm") else None,
        k_norm=_norm_weight(attention, "k_norm") if hasattr(attention, "k_norm") else None,
        qkv=qkv,
        o=o,
        feed_forward=feed_forward,
        sliding_window=getattr(paged_attention, "sliding_window", None),
    )


def _feed_forward(block: nn.Module) -> tuple[NativeLinear, NativeLinear] | tuple[NativeLinear, NativeExperts] | None:
    """What stands behind the attention; None when it is not native."""
    if not isinstance(block, MixtureOfExperts):
        return _native_kernels(block, "gate_up_proj", "down_proj")
    router, experts = block.gate.native_weight, block.kernel
    return None if router is None or not isinstance(experts, NativeExperts) else (router, experts)


def _native_kernels(parent: nn.Module, first: str, second: str) -> tuple[NativeLinear, NativeLinear] | None:
    """The kernels of two linear layers; None when one is not native."""
    one, other = (getattr(parent.get_submodule(name), "kernel", None) for name in (first, second))
    return (one, other) if isinstance(one, NativeLinear) and isinstance(other, NativeLinear) else None


def _norm_weight(parent: nn.Module, name: str) -> Tensor:
    """The weight of a RMSNorm as contiguous float32."""
    return parent.get_submodule(name).get_parameter("weight").data.to(torch.float32).contiguous()
