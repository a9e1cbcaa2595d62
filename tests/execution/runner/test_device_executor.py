"""The whole path of a GPU on a CPU, where Triton's interpreter runs the kernels: executor, overlapped steps, graphs, memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.core.types import LiveLimits, SamplingParams
from penstock.engine.engine import Engine
from penstock.execution.attention.backend import KVCacheSpec
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.runner import device_start, worker
from penstock.execution.runner.accelerator import HostAccelerator
from penstock.execution.runner.cuda_graphs import DecodeGraphs
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.executors import UniProcessExecutor
from penstock.execution.runner.step_graphs import StepGraphs
from penstock.execution.sampling.device_sampler import DeviceSampler
from penstock.llm import LLM
from penstock.testing.builders import make_request, run_to_end
from penstock.testing.checkpoints import write_tiny_checkpoint
from tests.execution.runner.device_harness import LaunchedSampler
from tests.execution.runner.harness import solo_tokens

MIB, GIB = 2**20, 2**30
BLOCK_BYTES = 2 * 16 * 16 * 4
NUM_BLOCKS = 24
# Few and short, because the interpreter takes milliseconds for every program.
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "triton",
    "dtype": "float32",
    "threads": 1,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
    "max_model_len": 64,
    "kv_cache_gib": NUM_BLOCKS * BLOCK_BYTES / GIB,
}
# A request with this token makes whatever fails in these tests fail.
POISON = 13


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device") / "small"
    return write_tiny_checkpoint(
        folder, num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, tokenizer=True
    )


@pytest.fixture(autouse=True)
def sampler_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling by Triton would take most of the interpreter's time, so tests have it only where they say so."""
    monkeypatch.setattr(device_start, "DeviceSampler", LaunchedSampler)


@pytest.fixture(scope="module")
def solo(small: Path) -> Callable[[Sequence[int], int], list[int]]:
    """Greedy tokens of a request that runs alone on torch's operators."""
    config = EngineConfig(attention_backend="torch")
    loaded = load_model(config, small, torch.device("cpu"), torch.float32, progress=False)
    return lambda prompt, count: solo_tokens(loaded, prompt, count)


@contextmanager
def _executor(folder: Path, **changes: Any) -> Iterator[UniProcessExecutor]:
    executor = UniProcessExecutor(EngineConfig(**(SETTINGS | changes)), folder)
    try:
        yield executor
    finally:
        executor.shutdown()


def _engine(executor: UniProcessExecutor) -> Engine:
    config = executor.config
    return Engine(
        executor,
        LiveLimits(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_prefill_tokens_while_decoding=config.max_prefill_tokens_while_decoding,
        ),
    )


def _greedy(prompt: Sequence[int], name: str, count: int = 3) -> Any:
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, seed=0)
    return make_request(prompt, request_id=name, sampling=sampling)


# ---- end to end ----


@pytest.mark.parametrize(("overlap", "eager"), [("on", False), pytest.param("off", True, marks=pytest.mark.slow)])
def test_llm_gives_the_tokens_of_the_cpu(
    small: Path, overlap: str, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests at once of three, one of them in chunks; sampling as on a CPU."""
    run, replayed = DecodeGraphs.run, []

    def watched(self: DecodeGraphs, num_requests: int) -> Tensor:
        replayed.append(num_requests)
        return run(self, num_requests)

    monkeypatch.setattr(DecodeGraphs, "run", watched)
    if not eager:
        monkeypatch.setattr(device_start, "DeviceSampler", DeviceSampler)
    samplings = [
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=5, ignore_eos=True),
        SamplingParams(temperature=0.9, top_p=0.8, seed=3, max_tokens=3, ignore_eos=True),
        SamplingParams(temperature=1.0, top_k=12, seed=6, max_tokens=3, ignore_eos=True, logprobs=2),
    ]
    prompts = [list(range(10)), [3, 4], [5, 6, 7]]
    settings = SETTINGS | {"overlap_scheduling": overlap, "enforce_eager": eager}
    outputs = []
    for choice in (settings, settings | {"attention_backend": "torch", "overlap_scheduling": "off"}):
        with LLM(str(small), **choice) as llm:
            outputs.append(llm.generate(list(prompts), samplings))
            assert llm.stats.step_failures == 0
    assert set(replayed) == (set() if eager else {1, 2})
    for ours, reference in zip(*outputs, strict=True):
        assert ours.error is None
        assert ours.outputs[0].token_ids == reference.outputs[0].token_ids
    ours, reference = (output[2].outputs[0].logprobs for output in outputs)
    assert ours is not None
    assert reference is not None
    assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in reference], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_drafts_are_verified_by_recorded_steps(small: Path, overlap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of the model itself, which are all right; the tokens are those of a CPU without drafts."""
    run, replayed = StepGraphs.run, []

    def watched(self: StepGraphs, num_requests: int, query_len: int) -> Tensor:
        replayed.append((num_requests, query_len))
        return run(self, num_requests, query_len)

    monkeypatch.setattr(StepGraphs, "run", watched)
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=4, ignore_eos=True, frequency_penalty=0.3, logprobs=1),
    ]
    prompts = [[3, 4, 5], [6, 7]]
    settings = SETTINGS | {"overlap_scheduling": overlap, "enforce_eager": False}
    speculation = {"speculative_model": str(small), "num_speculative_tokens": 2}
    outputs = []
    for choice in (settings | speculation, SETTINGS | {"attention_backend": "torch"}):
        with LLM(str(small), **choice) as llm:
            outputs.append(llm.generate(list(prompts), samplings))
            assert llm.stats.step_failures == 0
        if "speculative_model" in choice:
            assert llm.stats.accepted_draft_tokens == llm.stats.draft_tokens >= 4
    assert {query_len for _, query_len in replayed} == {1, 3}
    for ours, reference in zip(*outputs, strict=True):
        assert ours.outputs[0].token_ids == reference.outputs[0].token_ids
    ours, reference = (output[1].outputs[0].logprobs for output in outputs)
    assert ours is not None
    assert reference is not None
    assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in reference], abs=1e-4)


def test_says_what_it_has(small: Path) -> None:
    with _executor(small, overlap_scheduling="on", enforce_eager=False) as executor:
        info = executor.model_info()
        assert executor.max_inflight == info.max_inflight_steps == 2
        assert (info.attention_backend, info.device, info.device_name) == ("triton", "cpu", "")
        assert info.kernels.startswith("Triton 3.")
        assert info.cuda_graphs.startswith("captured 2 graphs for batches up to 2 in ")
        assert [phase for phase, _ in executor.timeline] == ["load", "full step", "kv cache", "graphs", "warm-up"]
        assert executor.kv_capacity().num_blocks == NUM_BLOCKS


def test_graphs_are_not_captured_when_that_is_not_wanted(small: Path) -> None:
    with _executor(small) as executor:
        assert executor.max_inflight == 1
        assert executor.model_info().cuda_graphs == "no CUDA graphs (--enforce-eager)"
    with _executor(small, enforce_eager=False, cuda_graph_max_batch_size=1) as executor:
        assert executor.model_info().cuda_graphs.startswith("captured 1 graph for batches up to 1 in ")


def test_blocks_must_suit_the_kernels(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"--block-size 8: .* blocks of 16 tokens or a multiple"):
        UniProcessExecutor(EngineConfig(**SETTINGS | {"block_size": 8}), small)


# ---- memory ----


class MeasuredAccelerator(HostAccelerator):
    """Knows what was taken: weights and buffers, then a graph at a time."""

    def __init__(self, step_bytes: int) -> None:
        super().__init__()
        self.free = 400 * MIB
        self._step_bytes = step_bytes
        self._recorded = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self._recorded += 1
        self.free -= 10 * MIB if self._recorded == 1 else 3 * MIB
        return super().record(function)

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, function: Callable[[], None]) -> int:
        function()
        self.free -= 50 * MIB  # what the load and the step left behind
        return self._step_bytes


def _use(accelerator: MeasuredAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_start, "make_accelerator", lambda device: accelerator)
    monkeypatch.setattr(worker, "share_of_free_memory", lambda device, local_ranks: accelerator.free)


def test_memory_is_measured_where_it_can_be(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(MeasuredAccelerator(70 * MIB), monkeypatch)
    monkeypatch.setattr("penstock.execution.runner.kv_memory.KV_CAP_FACTOR", 10**6)
    with _executor(small, kv_cache_gib=0.0, memory_utilization=0.5, enforce_eager=False) as executor:
        # Half of 400, less 50 for weights and buffers, 70 for a step, and 13 for two graphs.
        assert executor.kv_capacity().num_blocks == (200 - 50 - 70 - 13) * MIB // BLOCK_BYTES


def test_too_little_memory_names_every_part(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(MeasuredAccelerator(170 * MIB), monkeypatch)
    with pytest.raises(ConfigError, match=r"buffers take 50\.0 MiB, a full step 170\.0 MiB and CUDA graphs 0\.0 MiB"):
        UniProcessExecutor(EngineConfig(**SETTINGS | {"kv_cache_gib": 0.0, "memory_utilization": 0.5}), small)


def _out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_weights_that_do_not_fit_are_one_line(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: Any) -> LoadedModel:
        raise _out_of_memory()

    monkeypatch.setattr(worker, "load_model", load_model)
    _use(MeasuredAccelerator(1), monkeypatch)
    with pytest.raises(
        ConfigError, match=r"The weights of small \(0\.\d MiB as stored\) do not fit into 400\.0 MiB"
    ) as caught:
        UniProcessExecutor(EngineConfig(**SETTINGS), small)
    assert "--quantization int8" in str(caught.value)


def test_a_full_step_that_does_not_fit_is_one_line(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says_what_to_lower = r"A step of 8 tokens and 2 requests does not fit .*--max-num-batched-tokens"
    with (
        _failing_model(monkeypatch, lambda input_ids: len(input_ids) > 5),
        pytest.raises(ConfigError, match=says_what_to_lower),
    ):
        UniProcessExecutor(EngineConfig(**SETTINGS), small)


def test_a_cache_that_does_not_fit_is_one_line(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.execution.attention.triton_paged import TritonPagedAttention

    allocate = TritonPagedAttention.allocate_kv_cache

    def limited(self: Any, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> Any:
        if num_blocks > 1:
            raise _out_of_memory()
        return allocate(self, num_blocks, spec, device)

    monkeypatch.setattr(TritonPagedAttention, "allocate_kv_cache", limited)
    with pytest.raises(
        ConfigError, match=r"The KV cache of 0\.\d MiB does not fit.*--kv-cache-gib or --memory-utilization"
    ):
        UniProcessExecutor(EngineConfig(**SETTINGS), small)


# ---- running out of memory in a step ----


@contextmanager
def _failing_model(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[Tensor], bool], held: list[weakref.ref[Tensor]] | None = None
) -> Iterator[None]:
    """The model runs out of memory in steps for which `fails`, with a tensor in hand that `held` watches."""
    forward = CausalLM.forward

    def failing(self: CausalLM, input_ids: Tensor, positions: Tensor) -> Tensor:
        if fails(input_ids):
            in_hand = torch.zeros(1000)
            if held is not None:
                held.append(weakref.ref(in_hand))
            raise _out_of_memory()
        return forward(self, input_ids, positions)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", failing)
        yield


@pytest.mark.parametrize("overlap", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_request_that_does_not_fit_ends_alone(
    small: Path, solo: Callable[[Sequence[int], int], list[int]], monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    prompts = {"a": [1, 2, 3], "bad": [4, POISON], "c": [6, 7, 8]}
    held: list[weakref.ref[Tensor]] = []
    with _executor(small, overlap_scheduling=overlap) as executor:
        engine = _engine(executor)
        with _failing_model(monkeypatch, lambda input_ids: POISON in input_ids.tolist(), held):
            for name, prompt in prompts.items():
                engine.add(_greedy(prompt, name))
            collected = run_to_end(engine)
        assert collected.final["bad", 0].finish_reason == "error"
        for name in ("a", "c"):
            assert collected.tokens[name, 0] == solo(prompts[name], 3)
        assert engine.stats().step_failures >= 2
        assert engine.stats().kv_blocks_used == 0
        assert all(watched() is None for watched in held)
        engine.add(_greedy(prompts["bad"], "again"))
        assert run_to_end(engine).tokens["again", 0] == solo(prompts["bad"], 3)


def test_memory_that_runs_out_for_a_moment_costs_nobody_an_answer(
    small: Path, solo: Callable[[Sequence[int], int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, while a step of several requests is prepared for the device."""
    prompts = {"a": [1, 2, 3], "b": [4, 5, 6]}
    prepare, calls = DeviceBatch.prepare, []

    def limited(self: DeviceBatch, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise _out_of_memory()
        prepare(self, *arguments)

    with _executor(small, overlap_scheduling="on") as executor:
        engine = _engine(executor)
        monkeypatch.setattr(DeviceBatch, "prepare", limited)
        for name, prompt in prompts.items():
            engine.add(_greedy(prompt, name))
        collected = run_to_end(engine)
        assert engine.stats().step_failures == 1
    for name, prompt in prompts.items():
        assert collected.tokens[name, 0] == solo(prompt, 3)


def test_what_the_allocator_keeps_is_given_back(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = MeasuredAccelerator(MIB)
    monkeypatch.setattr(device_start, "make_accelerator", lambda device: accelerator)
    with _executor(small) as executor:
        engine = _engine(executor)
        asked: list[int] = []

        def free_bytes() -> int:
            asked.append(1)
            return 0

        monkeypatch.setattr(accelerator, "free_bytes", free_bytes)
        engine.add(_greedy([1, 2], "good", count=2))
        run_to_end(engine)
        assert not asked
        with _failing_model(monkeypatch, lambda input_ids: True):
            engine.add(_greedy([1, 2], "bad"))
            run_to_end(engine)
        assert asked
