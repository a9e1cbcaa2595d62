"""Mistral (Jiang et al., 2023, arXiv:2310.06825): Llama without biases, every layer with the same sliding window."""

from __future__ import annotations

from penstock.execution.layers.mlp import GatedMLP
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM, DecoderLayer
from penstock.execution.models.llama import LlamaAttention


def make_mistral_layer(config: ModelConfig, layer_index: int, options: LayerOptions) -> DecoderLayer:
    attention = LlamaAttention(config, layer_index, qkv_bias=False, o_bias=False, options=options)
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, options=options)
    return DecoderLayer(config, attention, mlp, options)


class MistralForCausalLM(CausalLM):
    native_layers = True

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__(config, make_mistral_layer, options)
