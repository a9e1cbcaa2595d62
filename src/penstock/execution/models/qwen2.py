"""Qwen2 and Qwen2.5 (Qwen team, 2024, arXiv:2407.10671): Llama with biases on query, key and value only."""

from __future__ import annotations

from penstock.execution.layers.mlp import GatedMLP
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM, DecoderLayer
from penstock.execution.models.llama import LlamaAttention


def make_qwen2_layer(config: ModelConfig, layer_index: int, options: LayerOptions) -> DecoderLayer:
    attention = LlamaAttention(config, layer_index, qkv_bias=True, o_bias=False, options=options)
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, options=options)
    return DecoderLayer(config, attention, mlp, options)


class Qwen2ForCausalLM(CausalLM):
    native_layers = True
    # The biases of its keys make a few of their numbers very large; with all keys in 8 bits perplexity collapses.
    wide_keys = True

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__(config, make_qwen2_layer, options)
