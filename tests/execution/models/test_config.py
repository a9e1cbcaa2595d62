"""config.json: read in its old and new forms, and every wrong field an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import ModelFormatError
from penstock.execution.layers.rotary import RopeConfig
from penstock.execution.models.config import SUPPORTED_MODEL_TYPES, ExpertsConfig, ModelConfig
from penstock.execution.models.registry import ARCHITECTURES

# Llama-2-7b as it was published: no head_dim, no biases, no rope_parameters.
LLAMA2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}

QWEN2 = LLAMA2 | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 100, "max_window_layers": 2}

REMOVED = object()


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    base = QWEN2 if changes.get("model_type") in ("qwen2", "qwen3", "qwen3_moe") else LLAMA2
    config = {name: value for name, value in (base | changes).items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_llama_2(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config == ModelConfig(
        model_type="llama",
        architecture="LlamaForCausalLM",
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        sliding_windows=(None,) * 32,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        eos_token_ids=(2,),
        dtype=torch.float16,
    )
    assert config.sliding_window is None
    assert config.max_model_len == 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500_000, "factor": 4.0}},
    ],
)
def test_rope_in_every_form(tmp_path: Path, changes: dict[str, Any]) -> None:
    rope = read(tmp_path, **changes).rope
    assert (rope.rope_type, rope.theta, rope.factor) == ("linear", 5e5, 4.0)


def test_yarn_reaches_beyond_max_position_embeddings(tmp_path: Path) -> None:
    """Qwen2.5 is published with 32768 positions and a factor of 4 for 131072."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(tmp_path, max_position_embeddings=32768, rope_scaling=scaling)
    assert config.max_model_len == 131072
    assert read(tmp_path, max_position_embeddings=131072, rope_scaling=scaling).max_model_len == 131072


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 64}, (None,) * 32),
        ({"model_type": "mistral", "sliding_window": 64}, (64,) * 32),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 32),
        ({"model_type": "mistral"}, (4096,) * 32),
        ({"model_type": "mixtral"}, (None,) * 32),
        ({"model_type": "mixtral", "sliding_window": 64}, (64,) * 32),
        ({"model_type": "qwen3_moe"}, (None,) * 4),
        ({"model_type": "qwen3_moe", "use_sliding_window": True}, (100,) * 4),
        ({"model_type": "qwen2"}, (None,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": False}, (None,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": True}, (None, None, 100, 100)),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, (100,) * 4),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (100, None, 100, None),
        ),
    ],
)
def test_sliding_windows(tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = read(tmp_path, **changes)
    assert config.sliding_windows == windows
    assert config.sliding_window == (windows[0] if len(set(windows)) == 1 else None)


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    assert read(tmp_path, generation={"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert read(tmp_path, generation={"temperature": 0.6}).eos_token_ids == (2,)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()


def test_qwen3_has_its_own_head_size(tmp_path: Path) -> None:
    assert read(tmp_path, model_type="qwen3", head_dim=REMOVED).head_dim == 128
    assert read(tmp_path, model_type="qwen3", head_dim=64).head_dim == 64


def test_every_supported_type_has_an_architecture() -> None:
    assert tuple(ARCHITECTURES) == SUPPORTED_MODEL_TYPES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"config\.json: model_type: 'gpt2' is not supported; supported: llama, mistral, mixtral, qwen2",
        ),
        ({"model_type": REMOVED}, r"model_type: is missing"),
        ({"hidden_size": REMOVED}, r"hidden_size: is missing"),
        ({"hidden_size": "4096"}, r"hidden_size: must be an integer, not '4096'"),
        ({"hidden_size": True}, r"hidden_size: must be an integer, not True"),
        ({"hidden_size": 4096.0}, r"hidden_size: must be an integer"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers: must be between 1 and"),
        ({"vocab_size": 2**40}, r"vocab_size: must be between 1 and"),
        ({"hidden_size": 4095}, r"hidden_size: 4095 is not a multiple of num_attention_heads = 32"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads: 5 does not divide num_attention_heads = 32"),
        ({"head_dim": 127}, r"head_dim: must be even"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps: must be above 0"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: must be above 0"),
        ({"hidden_act": "gelu"}, r"hidden_act: only 'silu' is supported"),
        ({"torch_dtype": "int8"}, r"dtype: 'int8' is not supported; supported: float32"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings: must be true or false"),
        ({"eos_token_id": "</s>"}, r"eos_token_id: must be a token id or a list of them"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id: must be a token id"),
        ({"rope_scaling": "linear"}, r"rope_scaling: must be an object"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            r"rope_scaling\.rope_type: 'longrope' is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor: is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"rope_parameters\.low_freq_factor: is missing"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: partial rotation is not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            r"layer_types: has 1 ",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            r"layer_types: 'chunked_attention' is not supported",
        ),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[" * 200_000, "not valid JSON"), (b"[]", "JSON object"), (b"\xff", "not valid")],
)
def test_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFormatError, match=rf"config\.json .*{message}"):
        ModelConfig.from_folder(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json does not exist"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({"model_type": "llama", "num_local_experts": 8}, None),
        (
            {"model_type": "mixtral"},
            ExpertsConfig(count=8, per_token=2, intermediate_size=11008, renormalize=True, layers=tuple(range(32))),
        ),
        (
            {"model_type": "qwen3_moe"},
            ExpertsConfig(count=128, per_token=8, intermediate_size=768, renormalize=False, layers=(0, 1, 2, 3)),
        ),
        (
            {
                "model_type": "qwen3_moe",
                "num_local_experts": 16,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 96,
                "norm_topk_prob": True,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [1],
            },
            ExpertsConfig(count=16, per_token=3, intermediate_size=96, renormalize=True, layers=(3,)),
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0, 1, 2, 3]}, None),
    ],
)
def test_experts(tmp_path: Path, changes: dict[str, Any], experts: ExpertsConfig | None) -> None:
    assert read(tmp_path, **changes).experts == experts


def test_the_widest_feed_forward_block(tmp_path: Path) -> None:
    assert read(tmp_path).feed_forward_width == 11008
    assert read(tmp_path, model_type="mixtral").feed_forward_width == 2 * (11008 + 4096)
    small: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "hidden_size": 512}
    assert read(tmp_path, model_type="qwen3_moe", **small).feed_forward_width == 2 * (64 + 512)
    assert read(tmp_path, model_type="qwen3_moe", mlp_only_layers=[0], **small).feed_forward_width == 11008


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9, "num_experts": 8}, "num_experts_per_tok: a token cannot go to 9 of 8 experts"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers: names layer 4, but there are 4"),
        ({"mlp_only_layers": ["a"]}, "mlp_only_layers: must be the number of a layer or a list of them"),
        ({"num_experts": 0}, "num_experts: must be between 1"),
    ],
)
def test_experts_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        read(tmp_path, model_type="qwen3_moe", **changes)
