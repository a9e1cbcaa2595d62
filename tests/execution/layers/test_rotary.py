"""Rotary embedding: frequencies against transformers' own functions, and rotation against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.execution.layers.rotary import (
    RopeConfig,
    RotaryEmbedding,
    apply_rotary,
    inverse_frequencies,
    yarn_attention_factor,
)

CPU = torch.device("cpu")

CONFIGS: dict[str, RopeConfig] = {
    "linear": RopeConfig(rope_type="linear", factor=8.0),
    "llama-3.1": RopeConfig(rope_type="llama3", theta=5e5, factor=8.0, original_max_position_embeddings=8192),
    "llama-3.2": RopeConfig(rope_type="llama3", theta=5e5, factor=32.0, original_max_position_embeddings=8192),
    "yarn": RopeConfig(rope_type="yarn", theta=1e6, factor=4.0, original_max_position_embeddings=32768),
    "yarn-mscale": RopeConfig(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.8
    ),
    "yarn-exact": RopeConfig(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=4096, truncate=False, attention_factor=1.1
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    ours = CONFIGS[name]
    parameters: dict[str, Any] = {
        "rope_type": ours.rope_type,
        "rope_theta": ours.theta,
        "factor": ours.factor,
        "low_freq_factor": ours.low_freq_factor,
        "high_freq_factor": ours.high_freq_factor,
        "original_max_position_embeddings": ours.original_max_position_embeddings,
        "mscale": ours.mscale,
        "mscale_all_dim": ours.mscale_all_dim,
        "attention_factor": ours.attention_factor,
        "truncate": ours.truncate,
    }
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072)
    config.rope_parameters = parameters
    expected, attention_factor = ROPE_INIT_FUNCTIONS[ours.rope_type](config, CPU)
    torch.testing.assert_close(inverse_frequencies(ours, head_dim), expected, rtol=1e-6, atol=0)
    if ours.rope_type == "yarn":
        assert yarn_attention_factor(ours) == pytest.approx(attention_factor)


def test_rotation_is_a_rotation_of_pairs() -> None:
    rotary = RotaryEmbedding(RopeConfig(), 8, torch.float32, CPU)
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 77, 4000])
    rotated = apply_rotary(x, *rotary(positions))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angle = positions[:, None, None] * inverse_frequencies(RopeConfig(), 8)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), dim=-1))
    assert torch.equal(rotated[0], x[0])


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn"])
def test_a_token_is_rotated_the_same_in_every_batch(rope_type: Any) -> None:
    config = RopeConfig(rope_type=rope_type, factor=4.0, original_max_position_embeddings=16)
    rotary = RotaryEmbedding(config, 8, torch.float32, CPU)
    together = rotary(torch.arange(64))
    for position in (0, 15, 16, 63):
        alone = rotary(torch.tensor([position]))
        torch.testing.assert_close(alone[0][0], together[0][position])
        torch.testing.assert_close(alone[1][0], together[1][position])


def test_dynamic_scaling_changes_nothing_within_the_original_length() -> None:
    dynamic = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16)
    scaled = RotaryEmbedding(dynamic, 8, torch.float32, CPU)(torch.arange(32))
    plain = RotaryEmbedding(RopeConfig(), 8, torch.float32, CPU)(torch.arange(32))
    torch.testing.assert_close(scaled[1][:16], plain[1][:16], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scaled[1][16:], plain[1][16:], atol=1e-3)
