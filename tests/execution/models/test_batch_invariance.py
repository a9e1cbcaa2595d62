"""A decode gives the same logits, to the last bit, alone and in any batch (float32 on a CPU with AVX-512)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.execution.layers.linear import packing_available
from penstock.execution.models.registry import load_model
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

CONTEXTS = [3, 16, 40, 41, 90, 170, 256, 300, 383, 450, 500, 640]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not packing_available(), reason="measured with AVX-512 only"
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_decodes_alone_and_together(tmp_path: Path, model_type: ModelType) -> None:
    folder = write_tiny_checkpoint(
        tmp_path, model_type, tie_word_embeddings=True, dtype="bfloat16", max_position_embeddings=1024
    )
    loaded = load_model(EngineConfig(), folder, torch.device("cpu"), torch.float32, progress=False)
    model = PagedModel(loaded, num_blocks=256)
    names = [str(length) for length in CONTEXTS]
    for name, length in zip(names, CONTEXTS, strict=True):
        model.step({name: random.Random(length).choices(range(256), k=length)})

    alone = {name: model.step({name: [7]})[name] for name in names}
    for size in (1, 2, 3, 5, 8, len(names)):
        batch = random.Random(size).sample(names, size)
        for name in batch:
            model.sequences[name].num_computed -= 1
        together = model.step({name: [7] for name in batch})
        for name in batch:
            assert torch.equal(together[name], alone[name]), (name, size)
