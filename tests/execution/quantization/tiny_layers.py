"""A tiny checkpoint's first layer, and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.execution.layers.rotary import RotaryEmbedding
from penstock.execution.models.config import ModelConfig
from penstock.execution.quantization.calibration import LayerRunner, Rotary
from penstock.execution.quantization.compressed_writer import SafetensorsReader
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint


def read_layer(folder: Path, model_type: ModelType = "llama", **settings: Any) -> tuple[Path, dict[str, Tensor]]:
    """A new checkpoint, and the weights of its layer 0 by name within the layer."""
    write_tiny_checkpoint(folder, model_type, **settings)
    reader = SafetensorsReader(folder)
    prefix = "model.layers.0."
    names = [name for name in reader.names() if name.startswith(prefix)]
    return folder, {name.removeprefix(prefix): reader.read(name) for name in names}


def rotary_of(config: ModelConfig) -> Rotary:
    return RotaryEmbedding(config.rope, config.head_dim, torch.float32, torch.device("cpu"))


def runner_of(folder: Path) -> LayerRunner:
    config = ModelConfig.from_folder(folder)
    return LayerRunner(config, rotary_of(config))
