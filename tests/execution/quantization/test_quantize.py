"""A whole checkpoint: the forward pass used for calibration against transformers, the schemes, and what the report says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.quantized import Float8Tensor, QuantizedTensor
from penstock.execution.models.config import ModelConfig
from penstock.execution.quantization.calibration import LINEAR_NAMES, round_activations, split_windows
from penstock.execution.quantization.compressed_writer import SafetensorsReader
from penstock.execution.quantization.quantize import GROUP_SIZES, SCHEMES, Quality, Scheme, quantize_checkpoint
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from tests.execution.quantization.tiny_layers import rotary_of, runner_of


class Collector:
    """Keeps what is written, quantised weights in float."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.quantized: dict[str, QuantizedTensor | Float8Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self.tensors
        self.tensors[name] = tensor

    def add_quantized(self, name: str, tensor: QuantizedTensor | Float8Tensor, scale_dtype: torch.dtype) -> None:
        self.add(name, tensor.dequantize())
        assert torch.equal(tensor.scales, tensor.scales.to(scale_dtype).float())
        self.quantized[name] = tensor


def windows(count: int, length: int = 48, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = torch.randint(0, 256, (count, length), generator=generator).tolist()
    return drawn


def run(folder: Path, scheme: str, group_size: int = 32, **texts: Sequence[Sequence[int]]) -> tuple[Quality, Collector]:
    config, writer = ModelConfig.from_folder(folder), Collector()
    texts = {"calibration": windows(16), "held_out": windows(4, seed=1), **texts}
    quality = quantize_checkpoint(
        SafetensorsReader(folder),
        writer,
        config,
        rotary_of(config),
        Scheme.named(scheme, group_size),
        calibration=texts["calibration"],
        held_out=texts["held_out"],
    )
    assert quality is not None
    return quality, writer


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_float_perplexity_is_that_of_transformers(
    tmp_path: Path, model_type: ModelType, settings: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_checkpoint(tmp_path, model_type, **settings)
    held_out = windows(3)
    quality, _ = run(folder, "int8", held_out=held_out)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for window in held_out:
        ids = torch.tensor([window])
        with torch.inference_mode():
            logits = reference(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert quality.tokens == 3 * 47
    assert quality.perplexity_before == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_writes_every_tensor(tmp_path: Path, scheme: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, dtype="bfloat16", num_shards=2)
    quality, writer = run(folder, scheme)
    reader = SafetensorsReader(folder)
    assert set(writer.tensors) == set(reader.names())
    assert set(writer.quantized) == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in LINEAR_NAMES}
    bits, group_size = (8, None) if scheme == "int8" else (4, 32)
    for name, tensor in writer.quantized.items():
        original = reader.read(name)
        if isinstance(tensor, Float8Tensor):
            assert (scheme, tensor.block) == ("fp8", (1, original.shape[1]))
        else:
            assert (tensor.bits, tensor.group_size) == (bits, group_size or original.shape[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(writer.tensors[name], reader.read(name))
        assert writer.tensors[name].dtype == torch.bfloat16
    assert 0 < quality.kl_divergence < {"int8": 0.002, "fp8": 0.02}.get(scheme, 0.1)
    assert {"int8": 0.9, "fp8": 0.8}.get(scheme, 0.6) < quality.top1_agreement <= 1


def test_calibrated_schemes_are_nearer_to_the_float_model(tmp_path: Path) -> None:
    # Text of few different tokens, so that some directions matter much more than others.
    folder = write_tiny_checkpoint(tmp_path, num_layers=3)
    calibration, held_out = ([[t % 24 for t in w] for w in texts] for texts in (windows(32), windows(8, seed=1)))
    divergences = {
        scheme: run(folder, scheme, calibration=calibration, held_out=held_out)[0].kl_divergence
        for scheme in ("int4-rtn", "int4-awq", "int4-gptq")
    }
    assert divergences["int4-awq"] < divergences["int4-rtn"]
    assert divergences["int4-gptq"] < 0.8 * divergences["int4-rtn"]


def test_the_report_is_about_the_written_weights(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    held_out = windows(2, seed=1)
    quality, writer = run(folder, "int4-awq", held_out=held_out)
    config, runner = ModelConfig.from_folder(folder), runner_of(folder)
    losses = []
    for window in held_out:
        hidden = writer.tensors["model.embed_tokens.weight"][torch.tensor(window)]
        for index in range(config.num_layers):
            prefix = f"model.layers.{index}."
            weights = {n.removeprefix(prefix): t for n, t in writer.tensors.items() if n.startswith(prefix)}
            hidden = runner.run(index, weights, hidden)
        normed = torch.nn.functional.rms_norm(hidden, (64,), writer.tensors["model.norm.weight"], config.rms_norm_eps)
        logits = normed @ writer.tensors["lm_head.weight"].T
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="none"))
    assert quality.perplexity_after == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)


def test_without_held_out_text_there_is_no_report(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    config, writer = ModelConfig.from_folder(folder), Collector()
    scheme = Scheme.named("int4-rtn", 32)
    quality = quantize_checkpoint(
        SafetensorsReader(folder), writer, config, rotary_of(config), scheme, calibration=[], held_out=[]
    )
    assert quality is None
    assert len(writer.quantized) == 14


def test_errors_name_the_fix(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="--scheme int4-gptq needs calibration text; give --calibration FILE"):
        run(folder, "int4-gptq", calibration=[])
    with pytest.raises(ConfigError, match=r"--group-size 128 does not divide the 64 .* use --group-size 32 or 64"):
        run(folder, "int4-rtn", 128)
    with pytest.raises(ConfigError, match="--scheme must be one of int8"):
        Scheme.named("int3", 32)
    with pytest.raises(ConfigError, match="--group-size must be one of 32, 64, 128, not 48"):
        Scheme.named("int4-rtn", 48)
    with pytest.raises(ConfigError, match="use --scheme int8"):
        Scheme.named("int4-rtn", GROUP_SIZES[0]).check_input_features(50, "down_proj")


class Incomplete(SafetensorsReader):
    """Lacks a tensor of layer 1, or has a third layer that config.json knows nothing of."""

    def __init__(self, folder: Path, *, lacking: str = "", renamed: str = "") -> None:
        super().__init__(folder)
        self._lacking, self._renamed = lacking, renamed

    def names(self) -> Sequence[str]:
        names = [name for name in super().names() if name != self._lacking]
        return [*names, self._renamed] if self._renamed else names


def test_checkpoints_that_do_not_match_their_config(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    config = ModelConfig.from_folder(folder)
    for reader, message in (
        (Incomplete(folder, lacking="model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (Incomplete(folder, renamed="model.layers.2.mlp.up_proj.weight"), "num_hidden_layers is 2"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            quantize_checkpoint(
                reader,
                Collector(),
                config,
                rotary_of(config),
                Scheme.named("int8", 32),
                calibration=[],
                held_out=[],
            )


def test_activations_are_rounded_per_token() -> None:
    x = torch.tensor([[127.0, 1.4, -0.6], [1.27, 0.013, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 1.0, -1.0], [1.27, 0.01, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_activations(x, 8), expected)


def test_windows_do_not_cross_documents() -> None:
    assert split_windows([[1, 2, 3, 4, 5], [6, 7]], 3) == [[1, 2, 3], [4, 5], [6, 7]]
    assert split_windows([[1, 2, 3, 4], [5]], 3) == [[1, 2, 3]]
    assert split_windows([[1, 2, 3, 4, 5], [6, 7]], 3, limit=5) == [[1, 2, 3], [4, 5]]
    assert split_windows([[1, 2, 3, 4, 5], [6, 7]], 3, limit=4) == [[1, 2, 3]]
