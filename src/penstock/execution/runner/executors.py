"""The executor of a real model: one process, one device.

Starting one is the start of an engine: settings are resolved, weights loaded, memory sized and taken, and a small prefill and decode run,
so that whoever comes first does not pay for it. On a CPU steps run where they are submitted (steps.py); on a GPU they go on behind the
host's back (device_start.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from penstock.core.config import EngineConfig
from penstock.core.types import ModelInfo
from penstock.engine.executor import KVCapacity, SpeculationProfile, StepHandle
from penstock.engine.step import SchedulerOutput
from penstock.execution.attention.backend import KVCacheSpec
from penstock.execution.kernels.native import isa, native_available, set_threads, unavailable_reason
from penstock.execution.kernels.triton.support import interpreted, triton_unavailable_reason
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import checkpoint_files
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.cpus import bind_to_cpus
from penstock.execution.runner.kv_memory import (
    KVPlan,
    MemoryUse,
    activation_bytes,
    allocate_kv_caches,
    free_host_memory,
    free_memory,
    plan_kv_memory,
)
from penstock.execution.runner.limits import (
    inflight_steps,
    resolve_device,
    resolve_limits,
    resolve_model_limits,
    runs_on_accelerator,
    torch_dtype,
)
from penstock.execution.runner.model_runner import ModelRunner
from penstock.execution.runner.out_of_memory import memory_must_suffice, mib
from penstock.execution.runner.rehearsal import small_steps
from penstock.execution.runner.steps import HostSteps, Steps
from penstock.execution.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

# After a failed step the scheduler may hold up to max_num_seqs requests beside those that it runs one at a time.
_SLOTS_PER_SEQ = 2


class UniProcessExecutor:
    """One model on one device in this process.

    `max_inflight`: how many steps may be submitted before the first is done; None: as --overlap-scheduling says. On a CPU 1 means that
    `submit` runs the step and returns when it is done; above that, one worker thread runs the steps in order, and the caller schedules the
    next one meanwhile. On a GPU `submit` never waits.

    config: the settings, with everything resolved. timeline: (phase, seconds) of the start. Raises ConfigError or ModelFormatError when
    it cannot start.
    """

    def __init__(
        self, config: EngineConfig, folder: Path, *, max_inflight: int | None = None, progress: bool = False
    ) -> None:
        self.timeline: list[tuple[str, float]] = []
        self._device = resolve_device(config.device)
        bind_to_cpus(config.cpus)
        self.config = resolve_limits(config, self._device)
        self.max_inflight = max_inflight or inflight_steps(self.config, self._device)
        self.micro_batches = 1
        self.speculation: SpeculationProfile | None = None
        set_threads(self.config.threads)
        self._graphs = ""
        if runs_on_accelerator(self.config, self._device):
            loaded, plan, self._steps = self._start_on_accelerator(folder, progress)
        else:
            loaded, plan, self._steps = self._start_on_host(folder, progress)
        self._capacity = KVCapacity(plan.num_blocks, self.config.block_size, plan.bytes_per_block, plan.num_host_blocks)
        self._model_info = self._describe(loaded, plan)
        with self._phase("warm-up"):
            for step in small_steps(self.config, plan.num_blocks):
                for error in self.submit(step).result().errors.values():
                    logger.warning("the warm-up request failed: %s", error)
        if loaded.pending_cache is not None:
            loaded.pending_cache.write_in_background()

    def submit(self, step: SchedulerOutput) -> StepHandle:
        return self._steps.submit(step)

    def kv_capacity(self) -> KVCapacity:
        return self._capacity

    def model_info(self) -> ModelInfo:
        return self._model_info

    def shutdown(self) -> None:
        """Wait for the steps in flight, then release the model and the cache. Idempotent."""
        self._steps.close()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timeline.append((name, time.perf_counter() - start))

    # ---- the start ----

    def _load(self, folder: Path, free_bytes: int, progress: bool) -> LoadedModel:
        with self._phase("load"), memory_must_suffice(lambda: self._no_memory(folder, free_bytes)):
            self.config = resolve_model_limits(self.config, ModelConfig.from_folder(folder))
            return load_model(self.config, folder, self._device, torch_dtype(self.config.dtype), progress)

    def _start_on_host(self, folder: Path, progress: bool) -> tuple[LoadedModel, KVPlan, Steps]:
        free_bytes = free_memory(self._device)
        loaded = self._load(folder, free_bytes, progress)
        config, device, max_slots = self.config, self._device, self._max_slots
        with self._phase("kv cache"):
            step_bytes = activation_bytes(config, loaded.config, torch_dtype(config.dtype))
            plan = self._plan(loaded, MemoryUse(free_bytes, loaded.weight_bytes, step_bytes))
            kv_caches, host_caches = allocate_kv_caches(
                plan, loaded.cache_spec, loaded.config.num_layers, loaded.attention_backend, device
            )
            runner = ModelRunner(
                loaded.model,
                loaded.attention_backend,
                kv_caches,
                host_caches,
                batch=PersistentBatch(max_slots, config.max_model_len, config.block_size, device),
                sampler=Sampler(loaded.config.vocab_size, max_slots, device, loaded.config.eos_token_ids),
                device=device,
            )
        return loaded, plan, HostSteps(runner, threaded=self.max_inflight > 1)

    def _start_on_accelerator(self, folder: Path, progress: bool) -> tuple[LoadedModel, KVPlan, Steps]:
        # Imports Triton, which a plain CPU does without.
        from penstock.execution.runner.device_start import DeviceStart, make_accelerator

        accelerator = make_accelerator(self._device)
        free_bytes = accelerator.free_bytes()
        loaded = self._load(folder, free_bytes, progress)
        with self._phase("full step"):
            start = DeviceStart(
                self.config,
                loaded,
                accelerator,
                max_slots=self._max_slots,
                max_inflight=self.max_inflight,
                free_bytes=free_bytes,
            )
            use = start.measure()
        with self._phase("kv cache"):
            plan = self._plan(loaded, use)
            kv_caches, host_caches = start.allocate(plan)
        with self._phase("graphs"):
            steps = start.start(kv_caches, host_caches, progress=progress)
        self._graphs = start.graphs_text
        return loaded, plan, steps

    @property
    def _max_slots(self) -> int:
        return _SLOTS_PER_SEQ * self.config.max_num_seqs

    def _plan(self, loaded: LoadedModel, use: MemoryUse) -> KVPlan:
        return plan_kv_memory(
            self.config,
            loaded.config,
            loaded.attention_backend,
            loaded.cache_spec,
            use,
            free_host_bytes=free_host_memory(),
        )

    def _no_memory(self, folder: Path, free_bytes: int) -> str:
        size = "" if self.config.load_format == "dummy" else f" ({mib(_checkpoint_bytes(folder))} as stored)"
        formats = "int8 or int4" if self._device.type == "cpu" else "int8, int4 or fp8"
        return (
            f"The weights of {folder.name}{size} do not fit into {mib(free_bytes)} of free memory: take --quantization {formats}, "
            "a smaller model, or stop what else uses the memory."
        )

    def _describe(self, loaded: LoadedModel, plan: KVPlan) -> ModelInfo:
        config, model = self.config, loaded.config
        return ModelInfo(
            architecture=model.architecture,
            dtype=config.dtype,
            device=config.device,
            device_name=_device_name(self._device),
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
            kernels=_kernels(config, self._device),
            cuda_graphs=self._graphs,
            max_inflight_steps=self.max_inflight,
            threads=config.threads if config.device == "cpu" else 0,
        )


def _checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint_files(folder))


def _cache_name(spec: KVCacheSpec) -> str:
    """The type of keys and values, or 'bfloat16 keys, float8_e4m3fn values'."""
    key, value = _name(spec.key_dtype), _name(spec.value_dtype)
    return value if key == value else f"{key} keys, {value} values"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    """What a GPU is called, with its compute capability; '' for a CPU."""
    if device.type == "cpu":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _kernels(config: EngineConfig, device: torch.device) -> str:
    """Whose arithmetic runs."""
    if runs_on_accelerator(config, device):
        return f"Triton {version('triton')}" + ("'s interpreter" if interpreted() else " kernels")
    if device.type != "cpu":
        return f"torch operators (no Triton kernels: {triton_unavailable_reason(device)})"
    return (
        f"native kernels ({isa()})"
        if native_available()
        else f"torch operators (no native kernels: {unavailable_reason()})"
    )
