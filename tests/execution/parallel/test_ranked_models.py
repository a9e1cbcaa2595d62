"""A model in parts computes what the whole model does: ranks as threads, every architecture, torch's operators and the native decoder."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.errors import ConfigError, IntegrityError
from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.kernels import native
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.loader import count_parameters
from penstock.execution.models.registry import build_model
from penstock.execution.parallel.groups import ModelPart, PipelineStage, TensorParallel
from penstock.execution.parallel.shared_memory import SharedMemoryCollectives, shared_memory_available
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.ranks import Meeting, RankedModel, ThreadCollectives

CPU = torch.device("cpu")
VOCABULARY = 273  # divides by nothing
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "num_layers": 3, "num_heads": 8, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "num_kv_heads": 1},
    "qwen3": {"model_type": "qwen3", "attention_bias": True, "head_dim": 16},
}
# Ranks that share each layer, stages. With 4 ranks, two of them have the same of the 2 key and value heads.
PARTS = [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)]

needs_native = pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
needs_shared_memory = pytest.mark.skipif(not shared_memory_available(), reason="no memory shared by processes here")
BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


@pytest.fixture(autouse=True)
def one_thread_after() -> Iterator[None]:
    yield
    native.set_threads(1)


def options(backend: str) -> LayerOptions:
    return LayerOptions(torch.float32, CPU, get_attention_backend(backend, CPU), native=backend == "native")


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def logits(model: RankedModel) -> Tensor:
    """Of two sequences: prompts in chunks, and single tokens in company."""
    first, second = prompt(1, 40), prompt(2, 40)
    steps: list[dict[str, list[int]]] = [
        {"first": first[:30]},
        {"first": first[30:31], "second": second[:33]},
        {"first": first[31:], "second": second[33:34]},
        {"second": second[34:]},
    ]
    return torch.cat([rows for step in steps for _, rows in sorted(model.step(step).items())])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_equal_the_whole(tmp_path: Path, architecture: str, backend: str) -> None:
    write_tiny_checkpoint(tmp_path, **(SHAPE | ARCHITECTURES[architecture]))
    whole = logits(RankedModel(tmp_path, options(backend)))
    assert whole.std() > 0.1
    for size, stages in PARTS:
        model = RankedModel(tmp_path, options(backend), tensor_parallel_size=size, stages=stages)
        assert all((part.model.native is not None) == (backend == "native") for ranks in model.models for part in ranks)
        parts = logits(model)
        # Stages compute the same things in the same order; sums over ranks are rounded in another one.
        torch.testing.assert_close(parts, whole, rtol=0, atol=0 if size == 1 else 1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_parts_on_the_kernels_of_a_gpu(tmp_path: Path, model_type: str) -> None:
    backend = pytest.importorskip("penstock.execution.attention.triton_paged").TritonPagedAttention()
    write_tiny_checkpoint(tmp_path, num_layers=2, vocab_size=65, **ARCHITECTURES[model_type])
    triton = LayerOptions(torch.float32, CPU, backend, triton=True)
    whole = RankedModel(tmp_path, options("torch"))
    model = RankedModel(tmp_path, triton, tensor_parallel_size=2, stages=2)
    for tokens in ([3, 50, 7, 12, 9], [4]):
        torch.testing.assert_close(model.step({"a": tokens})["a"], whole.step({"a": tokens})["a"], rtol=0, atol=1e-4)


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, **SHAPE)
    model = RankedModel(tmp_path, options("torch"), tensor_parallel_size=2)
    model.step({"a": [1, 2, 3]})
    for collectives in model.collectives:
        assert isinstance(collectives, ThreadCollectives)
        # The embedding, and attention and feed-forward block of three layers; the logits.
        assert (collectives.sums, collectives.gathers) == (7, 1)


@needs_native
@needs_shared_memory
@pytest.mark.parametrize("size", [2, 3])
def test_native_layers_over_shared_memory_have_the_same_bits_in_every_batch(tmp_path: Path, size: int) -> None:
    write_tiny_checkpoint(tmp_path / "model", **SHAPE | {"num_heads": 6, "num_kv_heads": 6})
    barrier = threading.Barrier(size, timeout=30)
    name = f"test-{random.SystemRandom().getrandbits(64):x}"
    with ThreadPoolExecutor(size) as pool:
        joining = [
            pool.submit(SharedMemoryCollectives.join, name, rank, size, barrier=barrier.wait) for rank in range(size)
        ]
    collectives = [future.result() for future in joining]
    model = RankedModel(tmp_path / "model", options("native"), tensor_parallel_size=size, collectives=collectives)
    tokens, other = prompt(1, 24), prompt(2, 24)
    alone = torch.cat([model.step({"alone": [token]})["alone"] for token in tokens])
    for threads in (1, 2):
        native.set_threads(threads)
        rows = [model.step({"together": tokens[:9], "other": other[:15]})["together"]]
        rows.append(model.step({"together": tokens[9:10], "other": other[15:]})["together"])
        rows.append(model.step({"together": tokens[10:]})["together"])
        assert torch.equal(torch.cat(rows), alone), threads
        model.finish("together")
        model.finish("other")


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_failing_sum_is_raised_by_the_native_decoder(tmp_path: Path, threads: int) -> None:
    class Failing(ThreadCollectives):
        def all_reduce(self, tensor: Tensor) -> None:
            super().all_reduce(tensor)
            if self.sums == 4:
                raise RuntimeError("rank 1 is gone")

    native.set_threads(threads)
    write_tiny_checkpoint(tmp_path, **SHAPE)
    meeting = Meeting(2)
    collectives = [Failing(rank, meeting) for rank in range(2)]
    model = RankedModel(tmp_path, options("native"), tensor_parallel_size=2, collectives=collectives)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        model.step({"a": [1, 2, 3]})
    assert torch.isfinite(model.step({"b": [1, 2, 3]})["b"]).all()


def has(model: CausalLM, name: str) -> bool:
    return any(known == name for known, _ in model.named_modules())


@pytest.mark.parametrize("tied", [False, True])
def test_who_holds_what(tmp_path: Path, tied: bool) -> None:
    config = ModelConfig.from_folder(write_tiny_checkpoint(tmp_path, **SHAPE | {"tie_word_embeddings": tied}))
    names = []
    for stage in range(3):
        part = ModelPart(stage=PipelineStage(stage, 3))
        model = build_model(config, dataclasses.replace(options("torch"), part=part))
        assert list(model.model.layers) == [str(stage)]
        names.append({name for name in ("model.embed_tokens", "model.norm", "lm_head") if has(model, name)})
    last = {"model.norm", "lm_head"}
    assert names == [{"model.embed_tokens"}, set(), {*last, "model.embed_tokens"} if tied else last]


def test_weights_are_counted_where_they_are(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, **SHAPE)
    [[whole]] = RankedModel(tmp_path, options("torch")).models
    stages = RankedModel(tmp_path, options("torch"), stages=3).models
    assert sum(stage.weight_bytes() for [stage] in stages) == whole.weight_bytes()
    [ranks] = RankedModel(tmp_path, options("torch"), tensor_parallel_size=2).models
    norms = 7 * 64 * 4
    assert sum(rank.weight_bytes() for rank in ranks) == whole.weight_bytes() + norms
    assert {count_parameters(rank) for rank in ranks} == {count_parameters(whole)}


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, **SHAPE)
    [[first], [last]] = RankedModel(tmp_path, options("torch"), stages=2).models
    with pytest.raises(IntegrityError, match="not the last"):
        first.compute_logits(torch.zeros(1, 64))
    with pytest.raises(IntegrityError, match="not the first"):
        last(torch.tensor([1]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("shape", "size", "stages", "message"),
    [
        ({}, 3, 1, "--tensor-parallel-size 3 does not divide the model's 8 attention heads"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, 1, "does not divide the model's 3 key and value heads"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, 1, "--tensor-parallel-size 4 is no multiple of the model's 3 key"),
        ({"intermediate_size": 97}, 2, 1, "does not divide the model's 97 output features of its gate projections"),
        ({"vocab_size": 5}, 4, 1, "--tensor-parallel-size 4 is too much for the model's vocabulary of 5 tokens"),
        ({}, 1, 4, "--pipeline-parallel-size 4 is more than the model's 3 layers"),
    ],
)
def test_impossible_parts(tmp_path: Path, shape: dict[str, Any], size: int, stages: int, message: str) -> None:
    config = ModelConfig.from_folder(write_tiny_checkpoint(tmp_path, **SHAPE | shape))
    part = ModelPart(TensorParallel(size - 1, size), PipelineStage(0, stages))
    with pytest.raises(ConfigError, match=message):
        build_model(config, dataclasses.replace(options("torch"), part=part))
