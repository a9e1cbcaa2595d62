"""config.json from GGUF metadata: the shapes of the checkpoints that the files were made from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from penstock.core.errors import ModelFormatError
from penstock.core.gguf import read_gguf_parts
from penstock.execution.layers.rotary import inverse_frequencies
from penstock.execution.models.config import ModelConfig
from penstock.hub.gguf_config import model_config, shortest_decimal
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from tests.gguf_files import QuantizationType, write_gguf

Edit = Callable[[gguf.GGUFWriter], None]


def convert(folder: Path, edit: Edit | None = None, **options: Any) -> ModelConfig:
    """The configuration that the engine reads after `folder`'s checkpoint went through a GGUF file."""
    file = write_gguf(folder, folder / "model.gguf", edit=edit, tokenizer=False, **options)
    target = folder / "converted"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(model_config(read_gguf_parts(file), [257])))
    return ModelConfig.from_folder(target)


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_kv_heads": 1}),
        ("llama", {"head_dim": 32, "max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 500_000.0}}),
        ("qwen2", {"rope_parameters": {"rope_theta": 1_000_000.0}}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_the_shape_is_that_of_the_checkpoint(tmp_path: Path, model_type: ModelType, shape: dict[str, Any]) -> None:
    folder = write_tiny_checkpoint(tmp_path, model_type, **shape)
    assert convert(folder) == ModelConfig.from_folder(folder)


def test_a_window_makes_it_mistral(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "mistral", sliding_window=40)
    assert convert(folder, lambda writer: writer.add_sliding_window(40)) == ModelConfig.from_folder(folder)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    assert convert(folder, lambda writer: writer.add_sliding_window(512)) == ModelConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (QuantizationType.F32, torch.float32),
        (QuantizationType.F16, torch.float16),
        (QuantizationType.BF16, torch.bfloat16),
        (QuantizationType.Q8_0, torch.float16),
    ],
)
def test_the_dtype_is_that_of_most_weights(tmp_path: Path, kind: QuantizationType, dtype: torch.dtype) -> None:
    assert convert(write_tiny_checkpoint(tmp_path), quantization=kind).dtype is dtype


# ---- stretched contexts ----


def test_linear_scaling(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    folder = write_tiny_checkpoint(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.5})
    assert convert(folder, edit) == ModelConfig.from_folder(folder)
    legacy = convert(folder, lambda writer: writer.add_float32("llama.rope.scale_linear", 2.5))
    assert legacy == ModelConfig.from_folder(folder)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_scaling_that_does_nothing(tmp_path: Path, factor: float) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)

    folder = write_tiny_checkpoint(tmp_path)
    assert convert(folder, edit) == ModelConfig.from_folder(folder)


def test_yarn(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_rope_scaling_yarn_beta_fast(16.0)

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
    folder = write_tiny_checkpoint(tmp_path, "qwen2", rope_parameters=yarn)
    assert convert(folder, edit) == ModelConfig.from_folder(folder)

    def with_factor(writer: gguf.GGUFWriter) -> None:
        edit(writer)
        writer.add_rope_scaling_attn_factors(0.5)

    attention_factor = convert(folder, with_factor).rope.attention_factor
    assert attention_factor == pytest.approx(0.5 * (1 + 0.1 * np.log(4.0)))


def converters_factors(head_dim: int, theta: float, factor: float, original: int, low: float, high: float) -> Any:
    """rope_freqs.weight as llama.cpp's converter computes it (LlamaModel.generate_extra_tensors)."""
    wavelengths = 2 * np.pi * np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    factors = np.where(wavelengths > original / low, factor, 1 / ((1 - smooth) / factor + smooth))
    return np.where(wavelengths < original / high, 1, factors).astype(np.float32)


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "original", "low", "high"),
    [
        (128, 500_000.0, 8.0, 8192, 1.0, 4.0),
        (64, 500_000.0, 32.0, 8192, 1.0, 4.0),
        (128, 500_000.0, 16.0, 16384, 1.0, 4.0),
        (128, 10_000.0, 5.0, 2048, 1.0, 8.0),
        (128, 500_000.0, 8.0, 8192, 2.0, 6.0),
        (16, 10_000.0, 8.0, 32, 1.0, 4.0),
    ],
)
def test_llama3_scaling_is_found_from_its_factors(
    tmp_path: Path, head_dim: int, theta: float, factor: float, original: int, low: float, high: float
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }
    folder = write_tiny_checkpoint(tmp_path, head_dim=head_dim, rope_parameters=rope)
    factors = converters_factors(head_dim, theta, factor, original, low, high)
    config = convert(folder, lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    expected = ModelConfig.from_folder(folder)
    if low == 1.0:
        assert config == expected
    torch.testing.assert_close(
        inverse_frequencies(config.rope, head_dim), inverse_frequencies(expected.rope, head_dim), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.linspace(1, 8, 8, dtype=np.float32), "does not hold the factors of Llama 3's rope scaling"),
        (np.array([1, 1, 1, 1, 1, 1, 8, 1], dtype=np.float32), "does not hold the factors"),
        (np.ones(7, dtype=np.float32), r"has type F32 and shape \[7\]; F32 and \[8\] are needed"),
        (np.ones(8, dtype=np.float16), r"has type F16"),
        (np.full(8, np.nan, dtype=np.float32), "holds a number that is no factor"),
        (np.zeros(8, dtype=np.float32), "holds a number that is no factor"),
    ],
)
def test_other_factors_are_refused(tmp_path: Path, factors: Any, message: str) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    with pytest.raises(ModelFormatError, match=rf"tensor 'rope_freqs\.weight': {message}"):
        convert(folder, lambda writer: writer.add_tensor("rope_freqs.weight", factors))


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    ones = np.ones(8, dtype=np.float32)
    assert convert(folder, lambda writer: writer.add_tensor("rope_freqs.weight", ones)) == ModelConfig.from_folder(
        folder
    )


def test_factors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))

    with pytest.raises(ModelFormatError, match=r"stands beside rope\.scaling\.type = linear"):
        convert(write_tiny_checkpoint(tmp_path), edit)


# ---- refused ----


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_count", 8, "llama.expert_count: mixtures of experts are not supported"),
        ("llama.attention.value_length", 8, "llama.attention.value_length: is 8; only the size of a head, 16"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count: is 8; only the size of a head, 16"),
        ("llama.embedding_length", 65, "a row of embedding_length = 65 per token is needed"),
        ("llama.block_count", 0, "llama.block_count: must be between 1 and 2147483647, not 0"),
        ("llama.attention.head_count", "4", "llama.attention.head_count: must be an integer, not '4'"),
        ("llama.context_length", None, "llama.context_length: is missing from the metadata"),
        ("llama.rope.freq_base", 0.0, "llama.rope.freq_base: must be above 0"),
        (
            "general.architecture",
            "gemma3",
            "general.architecture: 'gemma3' is not supported; supported: llama, qwen2, qwen3",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_field(tmp_path: Path, key: str, value: Any, message: str) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        pairs = writer.kv_data[0]
        pairs.pop(key, None)
        if value is not None:
            kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
            writer.add_key_value(key, value, kinds[type(value)])

    with pytest.raises(ModelFormatError, match=rf"model\.gguf: .*{message}"):
        convert(write_tiny_checkpoint(tmp_path), edit)


@pytest.mark.parametrize("kind", ["longrope", "something new"])
def test_unknown_scaling_is_refused(tmp_path: Path, kind: str) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(2.0)

    with pytest.raises(ModelFormatError, match=rf"llama\.rope\.scaling\.type: '{kind}' is not supported"):
        convert(write_tiny_checkpoint(tmp_path), edit)


@pytest.mark.parametrize("value", [1e-5, 1e-6, 500_000.0, 0.1, 3.0, 1e30])
def test_numbers_come_back_as_they_were_written(value: float) -> None:
    assert shortest_decimal(float(np.float32(value))) == value
    assert shortest_decimal(np.pi) == np.pi, "no float32"
