"""The native decoder computes what the modules compute, and a token's logits are the same to the last bit in whatever company it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.execution.kernels import native
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.testing.checkpoints import StorageType, write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

pytestmark = pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "num_heads": 8, "num_kv_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 6, "expert_size": 64, "mlp_only_layers": [0]},
}
# Checkpoint's type, settings, arithmetic type.
PRECISIONS: dict[str, tuple[StorageType, dict[str, Any], torch.dtype]] = {
    "float32": ("float32", {}, torch.float32),
    "bfloat16 weights": ("bfloat16", {}, torch.float32),
    "float16 weights": ("float16", {}, torch.float32),
    "bfloat16 arithmetic": ("bfloat16", {}, torch.bfloat16),
    "int8": ("float32", {"quantization": "int8"}, torch.float32),
    "int4": ("float32", {"quantization": "int4"}, torch.float32),
}
LENGTH = 90


@pytest.fixture(autouse=True)
def one_thread_after() -> Iterator[None]:
    yield
    native.set_threads(1)


def load(folder: Path, precision: str, architecture: str) -> LoadedModel:
    dtype, settings, arithmetic = PRECISIONS[precision]
    write_tiny_checkpoint(folder, dtype=dtype, max_position_embeddings=256, **ARCHITECTURES[architecture])
    config = EngineConfig(**settings, weight_cache=False)
    return load_model(config, folder, torch.device("cpu"), arithmetic, progress=False)


def logits_in_chunks(model: PagedModel, name: str, tokens: list[int], chunks: list[int]) -> Tensor:
    """Logits of all tokens, computed alone in steps of these sizes."""
    rows, start = [], 0
    for size in chunks:
        rows.append(model.step({name: tokens[start : start + size]})[name])
        start += size
    model.finish(name)
    return torch.cat(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_modules(tmp_path: Path, architecture: str) -> None:
    loaded = load(tmp_path, "float32", architecture)
    model = PagedModel(loaded)
    tokens = random.Random(1).choices(range(256), k=LENGTH)
    native_logits = logits_in_chunks(model, "native", tokens, [50, 1, LENGTH - 51])
    assert loaded.model.model.native is not None
    loaded.model.model.native = None
    module_logits = logits_in_chunks(model, "modules", tokens, [50, 1, LENGTH - 51])
    torch.testing.assert_close(native_logits, module_logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_in_every_batch_chunk_and_number_of_threads(
    tmp_path: Path, precision: str, architecture: str
) -> None:
    model = PagedModel(load(tmp_path, precision, architecture))
    prompts = {str(index): random.Random(index).choices(range(256), k=LENGTH - 7 * index) for index in range(6)}
    native.set_threads(1)
    alone = {name: logits_in_chunks(model, name, tokens, [1] * len(tokens)) for name, tokens in prompts.items()}
    assert alone["0"].std() > 0.01
    for threads in (1, 2):
        native.set_threads(threads)
        generator = random.Random(threads)
        rows: dict[str, list[Tensor]] = {name: [] for name in prompts}
        done = dict.fromkeys(prompts, 0)
        while waiting := [name for name in prompts if done[name] < len(prompts[name])]:
            step = {}
            for name in generator.sample(waiting, generator.randint(1, len(waiting))):
                size = generator.choice([1, 1, 2, 7, 16, 33])
                step[name] = prompts[name][done[name] : done[name] + size]
                done[name] += len(step[name])
            for name, logits in model.step(step).items():
                rows[name].append(logits)
        for name in prompts:
            assert torch.equal(torch.cat(rows[name]), alone[name]), (threads, name)
            model.finish(name)
