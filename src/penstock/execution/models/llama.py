"""Llama 2 and 3 (Touvron et al., 2023, arXiv:2307.09288; Llama team, 2024, arXiv:2407.21783)."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.execution.layers.attention import Attention
from penstock.execution.layers.linear import QKVParallelLinear, RowParallelLinear
from penstock.execution.layers.mlp import GatedMLP
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.rotary import Rotation
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM, DecoderLayer
from penstock.execution.parallel.sharding import local_heads


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions; optional biases on all projections."""

    def __init__(
        self, config: ModelConfig, layer_index: int, *, qkv_bias: bool, o_bias: bool, options: LayerOptions
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, config.num_heads, config.num_kv_heads, self.head_dim, bias=qkv_bias, options=options
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * self.head_dim, config.hidden_size, bias=o_bias, options=options
        )
        tensor = options.part.tensor
        _, num_kv_heads = local_heads(config.num_heads, config.num_kv_heads, tensor.rank, tensor.size)
        self.attn = Attention(
            options.part.stage.local_layer(layer_index, config.num_layers),
            num_kv_heads,
            self.head_dim,
            sliding_window=config.sliding_windows[layer_index],
            options=options,
        )

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))  # [T, H + 2 * KVH, D]
        output: Tensor = self.o_proj(self.attn(heads, rotation))
        return output


def make_llama_layer(config: ModelConfig, layer_index: int, options: LayerOptions) -> DecoderLayer:
    bias = config.attention_bias
    attention = LlamaAttention(config, layer_index, qkv_bias=bias, o_bias=bias, options=options)
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, options=options)
    return DecoderLayer(config, attention, mlp, options)


class LlamaForCausalLM(CausalLM):
    native_layers = True

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__(config, make_llama_layer, options)
