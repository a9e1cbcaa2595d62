"""Qwen3, dense (Qwen team, 2025, arXiv:2505.09388): every query and key head is normalised before it is rotated."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.execution.layers.attention import Attention
from penstock.execution.layers.linear import QKVParallelLinear, RowParallelLinear
from penstock.execution.layers.mlp import GatedMLP
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.rotary import Rotation
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM, DecoderLayer
from penstock.execution.parallel.sharding import local_heads


class Qwen3Attention(nn.Module):
    """Grouped-query attention with normalised heads. The head size is independent of the hidden size."""

    def __init__(self, config: ModelConfig, layer_index: int, options: LayerOptions) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        bias = config.attention_bias
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, config.num_heads, config.num_kv_heads, self.head_dim, bias=bias, options=options
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * self.head_dim, config.hidden_size, bias=bias, options=options
        )
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, options)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, options)
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
        output: Tensor = self.o_proj(self.attn(heads, rotation, self.q_norm, self.k_norm))
        return output


def make_qwen3_layer(config: ModelConfig, layer_index: int, options: LayerOptions) -> DecoderLayer:
    attention = Qwen3Attention(config, layer_index, options)
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, options=options)
    return DecoderLayer(config, attention, mlp, options)


class Qwen3ForCausalLM(CausalLM):
    native_layers = True

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__(config, make_qwen3_layer, options)
