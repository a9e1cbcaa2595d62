"""Executors that run a real model: today one process, with one device.

Starting one is the start of an engine: settings are resolved, weights loaded, memory sized and taken, and one small prefill and one
decode run, so that whoever comes first does not pay for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import IntegrityError
from penstock.core.types import ModelInfo, SamplingParams
from penstock.engine.executor import KVCapacity, StepHandle
from penstock.engine.step import CachedRequest, NewRequest, RunnerOutput, SchedulerOutput
from penstock.execution.attention.backend import KVCacheSpec
from penstock.execution.kernels.native import isa, native_available, set_threads, unavailable_reason
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.cpus import bind_to_cpus
from penstock.execution.runner.kv_memory import (
    KVPlan,
    activation_bytes,
    allocate_kv_caches,
    free_host_memory,
    free_memory,
    plan_kv_memory,
)
from penstock.execution.runner.limits import resolve_device, resolve_limits, resolve_model_limits, torch_dtype
from penstock.execution.runner.model_runner import ModelRunner
from penstock.execution.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

_WARM_UP_KEY = "warm-up/0"
_WARM_UP_TOKENS = 8
# After a failed step the scheduler may hold up to max_num_seqs requests beside those that it runs one at a time.
_SLOTS_PER_SEQ = 2


class _FinishedStep:
    """A step that has run: its output, or what it raised."""

    def __init__(self, outcome: RunnerOutput | Exception) -> None:
        self._outcome = outcome

    def done(self) -> bool:
        return True

    def result(self) -> RunnerOutput:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class _SubmittedStep:
    """A step that the worker thread runs or will run."""

    def __init__(self, future: Future[RunnerOutput]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> RunnerOutput:
        return self._future.result()


class UniProcessExecutor:
    """One model on one device in this process.

    With `max_inflight` 1 `submit` runs the step and returns when it is done. Above that, one worker thread runs the steps in order, and
    the caller schedules the next one meanwhile.

    config: the settings, with everything resolved. timeline: (phase, seconds) of the start. Raises ConfigError or ModelFormatError when
    it cannot start.
    """

    def __init__(self, config: EngineConfig, folder: Path, *, max_inflight: int = 1, progress: bool = False) -> None:
        self.max_inflight = max_inflight
        self.timeline: list[tuple[str, float]] = []
        self._device = resolve_device(config.device)
        bind_to_cpus(config.cpus)
        self.config = resolve_limits(config, self._device)
        set_threads(self.config.threads)
        free_bytes = free_memory(self._device)
        with self._phase("load"):
            self.config = resolve_model_limits(self.config, ModelConfig.from_folder(folder))
            dtype = torch_dtype(self.config.dtype)
            loaded = load_model(self.config, folder, self._device, dtype, progress)
        with self._phase("kv cache"):
            self._plan = plan_kv_memory(
                self.config,
                loaded.config,
                loaded.attention_backend,
                loaded.cache_spec,
                free_bytes=free_bytes,
                weight_bytes=loaded.weight_bytes,
                step_bytes=activation_bytes(self.config, loaded.config, dtype),
                free_host_bytes=free_host_memory(),
            )
            self._runner: ModelRunner | None = _make_runner(self.config, loaded, self._plan, self._device)
        self._capacity = KVCapacity(
            self._plan.num_blocks, self.config.block_size, self._plan.bytes_per_block, self._plan.num_host_blocks
        )
        self._model_info = _model_info(self.config, loaded, self._plan)
        with self._phase("warm-up"):
            self._warm_up()
        if loaded.pending_cache is not None:
            loaded.pending_cache.write_in_background()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="penstock-runner") if max_inflight > 1 else None

    def submit(self, step: SchedulerOutput) -> StepHandle:
        if self._runner is None:
            raise IntegrityError("a step was submitted to an executor that was shut down")
        if self._worker is not None:
            return _SubmittedStep(self._worker.submit(self._runner.execute, step))
        try:
            return _FinishedStep(self._runner.execute(step))
        except Exception as error:
            return _FinishedStep(error)

    def kv_capacity(self) -> KVCapacity:
        return self._capacity

    def model_info(self) -> ModelInfo:
        return self._model_info

    def shutdown(self) -> None:
        """Wait for the steps in flight, then release the model and the cache. Idempotent."""
        if self._worker is not None:
            self._worker.shutdown()
        self._runner = None

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timeline.append((name, time.perf_counter() - start))

    def _warm_up(self) -> None:
        """One prefill and one decode through everything, sampling included. Its request leaves nothing behind but a block's content,
        which no request reads before it has written it."""
        if self._runner is None:
            raise IntegrityError("an executor that was shut down cannot warm up")
        length = max(
            1, min(_WARM_UP_TOKENS, self.config.max_model_len - 1, self._plan.num_blocks * self.config.block_size - 1)
        )
        blocks = list(range(-(-(length + 1) // self.config.block_size)))
        request = NewRequest(
            key=_WARM_UP_KEY,
            token_ids=[0] * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=blocks,
            sampling=SamplingParams(seed=0, top_p=0.9, logprobs=1),
            seed=0,
            sample_index=0,
        )
        steps = [SchedulerOutput(0, new_requests=[request], num_scheduled_tokens={_WARM_UP_KEY: length})]
        if self.config.max_model_len > length:
            decode = CachedRequest(_WARM_UP_KEY, [], length)
            steps.append(SchedulerOutput(0, cached_requests=[decode], num_scheduled_tokens={_WARM_UP_KEY: 1}))
        steps.append(SchedulerOutput(0, finished_keys=[_WARM_UP_KEY]))
        for step in steps:
            output = self._runner.execute(step)
            for error in output.errors.values():
                logger.warning("the warm-up request failed: %s", error)


def _make_runner(config: EngineConfig, loaded: LoadedModel, plan: KVPlan, device: torch.device) -> ModelRunner:
    kv_caches, host_caches = allocate_kv_caches(
        plan, loaded.cache_spec, loaded.config.num_layers, loaded.attention_backend, device
    )
    max_slots = _SLOTS_PER_SEQ * config.max_num_seqs
    return ModelRunner(
        loaded.model,
        loaded.attention_backend,
        kv_caches,
        host_caches,
        batch=PersistentBatch(max_slots, config.max_model_len, config.block_size, device),
        sampler=Sampler(loaded.config.vocab_size, max_slots, device, loaded.config.eos_token_ids),
        device=device,
    )


def _model_info(config: EngineConfig, loaded: LoadedModel, plan: KVPlan) -> ModelInfo:
    model = loaded.config
    return ModelInfo(
        architecture=model.architecture,
        dtype=config.dtype,
        device=config.device,
        vocab_size=model.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_ids=model.eos_token_ids,
        num_parameters=loaded.num_parameters,
        weight_bytes=loaded.weight_bytes,
        model_hash=loaded.model_hash,
        block_size=config.block_size,
        kv_cache_tokens=plan.num_blocks * config.block_size,
        kv_cache_bytes=plan.num_blocks * plan.bytes_per_block,
        swap_tokens=plan.num_host_blocks * config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        attention_backend=loaded.attention_backend.name,
        weights=loaded.quantization if loaded.quantization != "none" else _name(loaded.weight_dtype),
        kv_cache_dtype=_cache_name(loaded.cache_spec),
        kernels=_kernels(config.device),
        threads=config.threads if config.device == "cpu" else 0,
    )


def _cache_name(spec: KVCacheSpec) -> str:
    """The type of keys and values, or 'bfloat16 keys, float8_e4m3fn values'."""
    key, value = _name(spec.key_dtype), _name(spec.value_dtype)
    return value if key == value else f"{key} keys, {value} values"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kernels(device: str) -> str:
    """Whose arithmetic runs on a CPU; '' on other devices."""
    if device != "cpu":
        return ""
    return (
        f"native kernels ({isa()})"
        if native_available()
        else f"torch operators (no native kernels: {unavailable_reason()})"
    )
