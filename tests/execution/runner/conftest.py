from pathlib import Path

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.testing.checkpoints import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("runner") / "tiny")


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> LoadedModel:
    """With torch's attention, which takes the harness's small blocks; native attention wants multiples of 16 tokens."""
    return _load(checkpoint)


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Another model with the same vocabulary."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    return _load(write_tiny_checkpoint(folder, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, seed=5))


def _load(folder: Path) -> LoadedModel:
    config = EngineConfig(attention_backend="torch")
    return load_model(config, folder, torch.device("cpu"), torch.float32, progress=False)
