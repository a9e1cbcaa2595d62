"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.moe import Routing
from penstock.execution.layers.moe import MixtureOfExperts
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.rotary import Rotation
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.llama import LlamaAttention


class MixtralLayer(nn.Module):
    """DecoderLayer with the names that Mixtral's checkpoints have."""

    def __init__(self, config: ModelConfig, layer_index: int, options: LayerOptions) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.self_attn = LlamaAttention(config, layer_index, qkv_bias=False, o_bias=False, options=options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.block_sparse_moe = mixture_of_experts(config, options, down_name="w2")

    def forward(self, residual: Tensor, delta: Tensor | None, rotation: Rotation) -> Tensor:
        """See DecoderLayer."""
        attended = self.self_attn(self.input_layernorm(residual, delta), rotation)
        output: Tensor = self.block_sparse_moe(self.post_attention_layernorm(residual, attended))
        return output


def mixture_of_experts(config: ModelConfig, options: LayerOptions, down_name: str = "down_proj") -> MixtureOfExperts:
    """The mixture of experts that `config` describes. down_name: what checkpoints call an expert's last product."""
    experts = config.experts
    if experts is None:
        raise IntegrityError(f"a {config.model_type} layer with experts was asked for, but the configuration has none")
    routing = Routing(experts.count, experts.per_token, experts.renormalize)
    return MixtureOfExperts(config.hidden_size, experts.intermediate_size, routing, options, down_name=down_name)


class MixtralForCausalLM(CausalLM):
    native_layers = True
    packed_modules: ClassVar[Mapping[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "w1": ("gate_up_proj", "gate"),
        "w3": ("gate_up_proj", "up"),
    }

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__(config, MixtralLayer, options)
