"""The executor on a real GPU: what a recording, the driver and the allocator do there cannot be seen on a CPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.core.types import SamplingParams
from penstock.execution.runner.executors import UniProcessExecutor
from penstock.llm import LLM
from penstock.testing.checkpoints import write_tiny_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MIB = 2**20
SETTINGS: dict[str, Any] = {"device": "cuda", "max_num_seqs": 24, "max_num_batched_tokens": 256, "kv_cache_gib": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that batches of different sizes nearly always agree on the greedy token."""
    folder = tmp_path_factory.mktemp("cuda") / "model"
    return write_tiny_checkpoint(folder, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2)


def _tokens(model: Path, **changes: Any) -> list[list[int]]:
    """Batches of up to 24, growing and shrinking, so that every graph is replayed and all have padding at times."""
    prompts = [[(7 * index + step) % 256 for step in range(3 + 11 * index % 90)] for index in range(40)]
    samplings = [SamplingParams(temperature=0.0, max_tokens=4 + index, ignore_eos=True) for index in range(40)]
    with LLM(str(model), **(SETTINGS | changes)) as llm:
        outputs = llm.generate(list(prompts), samplings)
    assert all(output.error is None for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


def test_graphs_and_overlap_change_no_token(model: Path) -> None:
    """Kernels choose how to sum by the size of the batch, and a graph's may be larger, so a few near ties may fall the other way. A number
    that was baked into a graph would change nearly every request."""
    plain = _tokens(model, enforce_eager=True, overlap_scheduling="off")
    for changes in ({}, {"overlap_scheduling": "off"}, {"cuda_graph_max_batch_size": 5}):
        ours = _tokens(model, **changes)
        assert [len(tokens) for tokens in ours] == [len(tokens) for tokens in plain]
        assert sum(tokens == expected for tokens, expected in zip(ours, plain, strict=True)) >= 36


def test_what_is_measured_leaves_room_for_what_comes(model: Path) -> None:
    free = torch.cuda.mem_get_info()[0]
    executor = UniProcessExecutor(
        EngineConfig(**SETTINGS | {"kv_cache_gib": 0.0, "memory_utilization": 0.5, "max_num_seqs": 256}), model
    )
    taken = free - torch.cuda.mem_get_info()[0]
    info = executor.model_info()
    executor.shutdown()
    assert info.cuda_graphs.startswith("captured ")
    # Code, graphs and weights; the cache of so small a model is bounded by what its requests can use.
    assert info.kv_cache_bytes < taken < info.kv_cache_bytes + 4096 * MIB
    assert taken < 0.6 * free


def test_a_cache_larger_than_the_gpu_is_one_line(model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--kv-cache-gib 10000 is .* are free beside weights, a full step and CUDA graphs"
    ):
        UniProcessExecutor(EngineConfig(**SETTINGS | {"kv_cache_gib": 10_000.0}), model)


def test_shutdown_gives_the_memory_back(model: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    executor = UniProcessExecutor(EngineConfig(**SETTINGS | {"kv_cache_gib": 2.0}), model)
    assert torch.cuda.memory_allocated() > before + 2000 * MIB
    executor.shutdown()
    del executor
    gc.collect()
    # What stays are the workspaces of the libraries.
    assert torch.cuda.memory_allocated() < before + 500 * MIB
