"""Runs the layers of a model whose weights, attention and arithmetic are all native as one call into C++.

The modules stay what they are: they hold the weights and define the model. Where they can all be expressed by the native decoder
(csrc/decoder.cpp), it computes the same thing, kernel by kernel, without returning to Python in between. A model says that its
layers are of that kind with `CausalLM.native_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.execution.attention.backend import KVCache
from penstock.execution.attention.context import get_forward_context
from penstock.execution.attention.native_paged import NativePagedAttention, cache_struct
from penstock.execution.kernels.attention import KV_KINDS, KVCacheStruct
from penstock.execution.kernels.decoder import DecoderHandle, DecoderLayerWeights, StepStruct
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.layers.rotary import RotaryEmbedding
from penstock.execution.models.config import ModelConfig


class NativeDecoder:
    """The layers and the final norm of one model."""

    def __init__(
        self, config: ModelConfig, layers: Sequence[DecoderLayerWeights], norm: Tensor, rotary: RotaryEmbedding
    ) -> None:
        self._rotary = rotary
        self._handle = DecoderHandle(
            layers,
            norm,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
        )
        self._step = StepStruct()
        self._kv_caches: list[KVCache] | None = None
        self._cache_structs: object = None

    def __call__(self, residual: Tensor, positions: Tensor) -> Tensor:
        """Embeddings float32 [T, hidden_size], which are overwritten, and positions int64 [T] → normalised hidden states, the same
        shape. Inside a forward context."""
        context = get_forward_context()
        attention = context.attention
        if self._kv_caches is not context.kv_caches:
            self._take_caches(context.kv_caches)
        table = self._rotary.table(attention.max_seq_len)
        hidden = torch.empty_like(residual)
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
    config: ModelConfig, layers: Sequence[nn.Module], norm: Tensor, rotary: RotaryEmbedding
) -> NativeDecoder | None:
    """A native decoder for these layers; None when a product or the attention is not native. The layers have DecoderLayer's parts."""
    weights = [_layer_weights(layer) for layer in layers]
    known = [layer for layer in weights if layer is not None]
    return NativeDecoder(config, known, norm, rotary) if len(known) == len(weights) else None


def _layer_weights(layer: nn.Module) -> DecoderLayerWeights | None:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    kernels = [
        getattr(module, "kernel", None)
        for module in (
            attention.get_submodule("qkv_proj"),
            attention.get_submodule("o_proj"),
            mlp.get_submodule("gate_up_proj"),
            mlp.get_submodule("down_proj"),
        )
    ]
    native = [kernel for kernel in kernels if isinstance(kernel, NativeLinear)]
    paged_attention = attention.get_submodule("attn")
    if len(native) < len(kernels) or not isinstance(getattr(paged_attention, "backend", None), NativePagedAttention):
        return None
    qkv, o, gate_up, down = native
    return DecoderLayerWeights(
        input_norm=_norm_weight(layer, "input_layernorm"),
        post_attention_norm=_norm_weight(layer, "post_attention_layernorm"),
        q_norm=_norm_weight(attention, "q_norm") if hasattr(attention, "q_norm") else None,
        k_norm=_norm_weight(attention, "k_norm") if hasattr(attention, "k_norm") else None,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        sliding_window=getattr(paged_attention, "sliding_window", None),
    )


def _norm_weight(parent: nn.Module, name: str) -> Tensor:
    """The weight of a RMSNorm as contiguous float32."""
    return parent.get_submodule(name).get_parameter("weight").data.to(torch.float32).contiguous()
