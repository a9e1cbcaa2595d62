"""Qwen3 with mixtures of experts (Qwen team, 2025, arXiv:2505.09388): Qwen3's attention, and experts in most layers."""

from __future__ import annotations

from penstock.execution.layers.mlp import GatedMLP
from penstock.execution.layers.moe import MixtureOfExperts
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM, DecoderLayer
from penstock.execution.models.mixtral import mixture_of_experts
from penstock.execution.models.qwen3 import Qwen3Attention


def make_qwen3_moe_layer(config: ModelConfig, layer_index: int, options: LayerOptions) -> DecoderLayer:
    attention = Qwen3Attention(config, layer_index, options)
    mlp: MixtureOfExperts | GatedMLP
    if config.experts is not None and layer_index in config.experts.layers:
        mlp = mixture_of_experts(config, options)
    else:
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, options=options)
    return DecoderLayer(config, attention, mlp, options)


class Qwen3MoeForCausalLM(CausalLM):
    native_layers = True

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__(config, make_qwen3_moe_layer, options)
