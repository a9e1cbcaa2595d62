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
    config = EngineConfig(attention_backend="torch")
    return load_model(config, checkpoint, torch.device("cpu"), torch.float32, progress=False)
