import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, IntegrityError, ModelFormatError
from penstock.core.types import LiveLimits, SamplingParams
from penstock.engine.engine import Engine
from penstock.engine.step import CachedRequest, SchedulerOutput
from penstock.execution.kernels.native import native_available
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner import worker
from penstock.execution.runner.executors import UniProcessExecutor
from penstock.testing.builders import make_request, run_to_end
from tests.execution.runner.harness import new_request, solo_tokens

GIB = 2**30
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16


def _config(**changes: Any) -> EngineConfig:
    config = EngineConfig(device="cpu", threads=1, kv_cache_gib=64 * BLOCK_BYTES / GIB)
    return dataclasses.replace(config, **changes)


@contextmanager
def _executor(checkpoint: Path, *, max_inflight: int | None = 1, **changes: Any) -> Iterator[UniProcessExecutor]:
    executor = UniProcessExecutor(_config(**changes), checkpoint, max_inflight=max_inflight)
    try:
        yield executor
    finally:
        executor.shutdown()


def test_says_what_it_has(checkpoint: Path, loaded: LoadedModel) -> None:
    with _executor(checkpoint, swap_space_gib=5 * BLOCK_BYTES / GIB) as executor:
        capacity, info = executor.kv_capacity(), executor.model_info()
        assert (capacity.num_blocks, capacity.block_size, capacity.bytes_per_block) == (64, 16, BLOCK_BYTES)
        assert capacity.num_host_blocks == 5
        assert (info.kv_cache_tokens, info.kv_cache_bytes, info.swap_tokens) == (1024, 64 * BLOCK_BYTES, 80)
        assert (info.dtype, info.device, info.max_model_len, info.eos_token_ids) == ("float32", "cpu", 512, (257,))
        assert (info.num_parameters, info.model_hash) == (loaded.num_parameters, loaded.model_hash)
        assert (info.max_num_seqs, info.max_num_batched_tokens) == (64, 512)
        assert info.attention_backend == ("native" if native_available() else "torch")
        assert [phase for phase, _ in executor.timeline] == ["load", "kv cache", "warm-up"]
        assert all(seconds >= 0 for _, seconds in executor.timeline)


SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=15, ignore_eos=True, seed=1),
    SamplingParams(temperature=1.1, top_k=20, presence_penalty=0.5, max_tokens=9, ignore_eos=True, seed=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=14, ignore_eos=True, seed=3),
]


PROMPTS = [[*range(30), *range(index, 4 * index)] for index in range(12)]


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> list[list[int]]:
    """What each request gives when it runs alone."""
    samplings = [SAMPLINGS[index % 4] for index in range(len(PROMPTS))]
    return [
        solo_tokens(loaded, prompt, sampling.max_tokens or 0, sampling, seed=sampling.seed or 0)
        for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]


@pytest.mark.parametrize("max_inflight", [1, 2, 4])
def test_an_engine_gives_the_tokens_of_solo_runs_at_any_depth(
    checkpoint: Path, expected: list[list[int]], max_inflight: int
) -> None:
    """Little room and a small budget: prompts come in chunks, requests are preempted, prefixes are shared."""
    changes = {"kv_cache_gib": 11.5 * BLOCK_BYTES / GIB, "swap_space_gib": 64 * BLOCK_BYTES / GIB}
    with _executor(checkpoint, max_inflight=max_inflight, **changes) as executor:
        limits = LiveLimits(max_num_batched_tokens=24, max_num_seqs=6, max_prefill_tokens_while_decoding=10)
        engine = Engine(executor, limits)
        for index, prompt in enumerate(PROMPTS):
            engine.add(make_request(prompt, request_id=str(index), sampling=SAMPLINGS[index % 4]))
        tokens = run_to_end(engine).tokens
        assert engine.stats().preemptions > 0
        # By now the first prompts live in the host tier only.
        for index, prompt in enumerate(PROMPTS[:3]):
            engine.add(make_request(prompt, request_id=f"again {index}", sampling=SAMPLINGS[index % 4]))
        again = run_to_end(engine).tokens
        assert engine.stats().prefix_hit_tokens > 0
        assert engine.stats().swapped_in_blocks > 0
    assert [tokens[str(index), 0] for index in range(len(PROMPTS))] == expected
    assert [again[f"again {index}", 0] for index in range(3)] == expected[:3]


@pytest.mark.parametrize("max_inflight", [1, 3])
def test_a_step_that_raises_gives_its_error_to_its_handle(
    checkpoint: Path, loaded: LoadedModel, max_inflight: int
) -> None:
    prompt = [1, 2, 3, 4]
    with _executor(checkpoint, max_inflight=max_inflight) as executor:
        first = executor.submit(
            SchedulerOutput(0, new_requests=[new_request("a", prompt, [9])], num_scheduled_tokens={"a": 4})
        )
        bad = executor.submit(
            SchedulerOutput(1, cached_requests=[CachedRequest("nobody", [], 0)], num_scheduled_tokens={"nobody": 1})
        )
        last = executor.submit(
            SchedulerOutput(2, cached_requests=[CachedRequest("a", [], 4)], num_scheduled_tokens={"a": 1})
        )
        with pytest.raises(IntegrityError, match="nobody"):
            bad.result()
        tokens = [*first.result().sampled_token_ids["a"], *last.result().sampled_token_ids["a"]]
        assert tokens == solo_tokens(loaded, prompt, 2)
        assert first.done()
        assert bad.done()
        assert last.done()


def test_overlap_on_a_cpu_is_a_thread_that_runs_steps(checkpoint: Path, loaded: LoadedModel) -> None:
    with _executor(checkpoint, max_inflight=None, overlap_scheduling="on") as executor:
        assert executor.max_inflight == executor.model_info().max_inflight_steps == 2
        step = SchedulerOutput(0, new_requests=[new_request("a", [1, 2, 3], [9])], num_scheduled_tokens={"a": 3})
        assert executor.submit(step).result().sampled_token_ids["a"] == solo_tokens(loaded, [1, 2, 3], 1)
    with _executor(checkpoint, max_inflight=None) as executor:
        assert executor.max_inflight == executor.model_info().max_inflight_steps == 1


def test_weights_that_do_not_fit_say_what_to_take_instead(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> LoadedModel:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(worker, "load_model", load)
    says = r"The weights of tiny \(\d\.\d MiB as stored\) do not fit into .* MiB of free memory: take --quantization int8 or int4,"
    with pytest.raises(ConfigError, match=says):
        UniProcessExecutor(_config(), checkpoint)


def test_shutdown_is_idempotent_and_final(checkpoint: Path) -> None:
    with _executor(checkpoint, max_inflight=2) as executor:
        executor.shutdown()
        executor.shutdown()
        with pytest.raises(IntegrityError, match="shut down"):
            executor.submit(SchedulerOutput(0))


def test_a_large_cache_takes_no_memory_before_it_is_used(checkpoint: Path) -> None:
    before = psutil.Process().memory_info().rss
    with _executor(checkpoint, kv_cache_gib=0.24) as executor:
        assert executor.model_info().kv_cache_bytes > 0.2 * GIB
        assert psutil.Process().memory_info().rss - before < 0.1 * GIB


def test_the_shortest_context_starts(checkpoint: Path) -> None:
    with _executor(checkpoint, max_model_len=1) as executor:
        assert executor.model_info().max_request_tokens == 1


def test_dummy_weights_start_without_a_checkpoints_weights(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with _executor(tmp_path, load_format="dummy") as executor:
        assert executor.model_info().model_hash.startswith("dummy-0-")


def test_what_cannot_start_says_why(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        UniProcessExecutor(_config(), tmp_path)
    with pytest.raises(ConfigError, match="--max-model-len"):
        UniProcessExecutor(_config(max_model_len=10**6), checkpoint)
    with pytest.raises(ConfigError, match="--kv-cache-gib"):
        UniProcessExecutor(_config(kv_cache_gib=1e-9), checkpoint)
    assert torch.get_num_threads() == 1
