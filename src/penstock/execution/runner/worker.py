"""A rank: what one process does with its part of a model on one device.

    place ─ load the part ─ measure what a step takes ─ `plan`: how large a cache could be
                                                        `begin`: the cache that all ranks have room for ─ `submit`: steps

The executor that owns the only rank, or a process that an executor on another side of a socket owns, calls this in order. On a CPU steps
run where they are submitted (steps.py); on a GPU they go on behind the host's back (device_start.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.core.types import ModelInfo
from penstock.engine.executor import StepHandle
from penstock.engine.step import RequestKey, SchedulerOutput
from penstock.execution.kernels.native import set_threads
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import checkpoint_files
from penstock.execution.parallel.groups import WHOLE_MODEL, ModelPart
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.cpus import bind_to_cpus
from penstock.execution.runner.description import describe, fingerprint
from penstock.execution.runner.draft_lengths import max_draft_tokens
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
from penstock.execution.runner.model_runner import Model, ModelRunner
from penstock.execution.runner.out_of_memory import memory_must_suffice, mib
from penstock.execution.runner.pipeline import LaterStage, StageLink, StageRunner
from penstock.execution.runner.speculation import draft_bytes_per_block, load_draft, make_proposer
from penstock.execution.runner.steps import HostSteps, StepRunner, Steps
from penstock.execution.sampling.sampler import Sampler

if TYPE_CHECKING:
    from penstock.execution.runner.device_start import DeviceStart

# After a failed step the scheduler may hold up to max_num_seqs requests beside those that it runs one at a time.
_SLOTS_PER_SEQ = 2


@dataclass(frozen=True)
class Place:
    """Where a rank is: its number among those of this machine, how many those are, and the ranks of the pipeline stages before and after
    its own that hold the same share of their layers; None where there is no such stage."""

    local_rank: int = 0
    local_ranks: int = 1
    previous: int | None = None
    next: int | None = None


class ModelWorker:
    """One part of a model on one device.

    max_inflight: how many steps may be submitted before the first is done; None: as --overlap-scheduling says. free_bytes: what may be
    taken of the device's memory as long as nothing is loaded; None: this rank's share of what is free now.

    config: the settings, with everything resolved. timeline: (phase, seconds) of the start. loaded: the model. draft: the draft model, on
    the last stage of an engine that has one. Raises ConfigError or ModelFormatError when it cannot start.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        *,
        part: ModelPart = WHOLE_MODEL,
        place: Place | None = None,
        free_bytes: int | None = None,
        max_inflight: int | None = None,
        progress: bool = False,
    ) -> None:
        self.timeline: list[tuple[str, float]] = []
        self.part = part
        self._place = place or Place()
        self._progress = progress
        self._device = resolve_device(config.device, self._place.local_rank)
        bind_to_cpus(config.cpus, self._place.local_rank, self._place.local_ranks)
        self.config = resolve_limits(config, self._device, self._place.local_ranks)
        set_threads(self.config.threads)
        self.max_inflight = max_inflight or inflight_steps(self.config, self._device)
        if part.stage.count > 1:
            # A stage works on one step at a time, and the stages together on as many as there are of them.
            self.max_inflight = part.stage.count
        self.draft: LoadedModel | None = None
        self._start: DeviceStart | None = None
        self._steps: Steps | None = None
        self._link: StageLink | None = None
        self._stage_runner: StageRunner | None = None
        self._graphs = ""
        if free_bytes is None:
            free_bytes = share_of_free_memory(self._device, self._place.local_ranks)
        self.loaded = self._load(folder, free_bytes)
        self._use = self._measure(free_bytes)

    # ---- the start ----

    def plan(self) -> KVPlan:
        """The cache that this rank has room for. Raises ConfigError when no useful request fits, or the host tier does not."""
        loaded = self.loaded
        bytes_per_block = loaded.num_layers * loaded.attention_backend.bytes_per_block(loaded.cache_spec)
        if self.draft is not None:
            bytes_per_block += draft_bytes_per_block(self.draft)
        free_host_bytes = free_host_memory() // self._place.local_ranks
        return plan_kv_memory(self.config, bytes_per_block, self._use, free_host_bytes=free_host_bytes)

    def begin(self, plan: KVPlan) -> None:
        """Take the memory of the cache and be ready for steps. Raises ConfigError when it does not fit after all."""
        if self._start is not None:
            with self._phase("kv cache"):
                kv_caches, host_caches = self._start.allocate(plan)
            with self._phase("graphs"):
                self._steps = self._start.start(kv_caches, host_caches, progress=self._progress)
            self._graphs = self._start.graphs_text
            return
        with self._phase("kv cache"):
            runner = self._make_runner(plan)
            self._steps = HostSteps(runner, threaded=self.max_inflight > 1 and self.part.stage.count == 1)

    def learn(self, sampled_token_ids: Mapping[RequestKey, Sequence[int]]) -> None:
        """Tokens that the last stage has sampled meanwhile; only other stages need to be told. Call it before `submit`."""
        if self._stage_runner is not None:
            self._stage_runner.learn(sampled_token_ids)

    def submit(self, step: SchedulerOutput) -> StepHandle:
        """See Executor."""
        assert self._steps is not None  # noqa: S101  `begin` comes first
        return self._steps.submit(step)

    def close(self) -> None:
        """Wait for the steps in flight, then release the model and the cache. Idempotent."""
        if self._steps is not None:
            self._steps.close()
        if self._link is not None:
            self._link.close()

    def write_weight_cache(self) -> None:
        """Keep packed weights on disk, in the background, if that is worth while. For after the start."""
        if self.loaded.pending_cache is not None:
            self.loaded.pending_cache.write_in_background()

    @property
    def _max_slots(self) -> int:
        return _SLOTS_PER_SEQ * self.config.max_num_seqs

    @property
    def _on_accelerator(self) -> bool:
        """Whether steps go on behind the host's back. Stages of a pipeline wait for each other on the host."""
        return self.part.stage.count == 1 and runs_on_accelerator(self.config, self._device)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timeline.append((name, time.perf_counter() - start))

    def _load(self, folder: Path, free_bytes: int) -> LoadedModel:
        with self._phase("load"), memory_must_suffice(lambda: self._no_memory(folder, free_bytes)):
            model_config = ModelConfig.from_folder(folder)
            self.config = resolve_model_limits(self.config, model_config)
            _check_stages(self.part, model_config)
            dtype = torch_dtype(self.config.dtype)
            loaded = load_model(self.config, folder, self._device, dtype, self._progress, self.part)
            if self.part.stage.is_last:
                self.draft = load_draft(self.config, loaded, self._device, self._progress)
            return loaded

    def _measure(self, free_bytes: int) -> MemoryUse:
        """What is taken before there is a cache."""
        weight_bytes = self.loaded.weight_bytes + (self.draft.weight_bytes if self.draft is not None else 0)
        if not self._on_accelerator:
            dtype, drafts = torch_dtype(self.config.dtype), max_draft_tokens(self.config)
            step_bytes = activation_bytes(self.config, self.loaded.config, dtype, drafts)
            return MemoryUse(free_bytes, weight_bytes, step_bytes)
        # Imports Triton, which a plain CPU does without.
        from penstock.execution.runner.device_start import DeviceStart, make_accelerator

        with self._phase("full step"):
            self._start = DeviceStart(
                self.config,
                self.loaded,
                make_accelerator(self._device),
                max_slots=self._max_slots,
                max_inflight=self.max_inflight,
                free_bytes=free_bytes,
                draft=self.draft,
            )
            return self._start.measure()

    def _make_runner(self, plan: KVPlan) -> StepRunner:
        """What runs steps on the host: all of them, or those of a stage."""
        config, loaded, device, stage = self.config, self.loaded, self._device, self.part.stage
        if runs_on_accelerator(config, device):
            # Kernels read the table of positions where it is, and never ask for a longer one.
            loaded.model.prepare(config.max_model_len)
        kv_caches, host_caches = allocate_kv_caches(
            plan, loaded.cache_spec, loaded.num_layers, loaded.attention_backend, device
        )
        batch = PersistentBatch(self._max_slots, config.max_model_len, config.block_size, device)
        if stage.count > 1:
            self._link = StageLink(
                self._place.previous,
                self._place.next,
                hidden_size=loaded.config.hidden_size,
                dtype=loaded.activation_dtype,
                device=device,
            )
        if self._link is not None and not stage.is_last:
            self._stage_runner = StageRunner(
                loaded.model,
                loaded.attention_backend,
                kv_caches,
                host_caches,
                batch=batch,
                device=device,
                link=self._link,
            )
            return self._stage_runner
        model: Model = loaded.model if self._link is None else LaterStage(loaded.model, self._link)
        sampler = Sampler(loaded.config.vocab_size, self._max_slots, device, loaded.config.eos_token_ids)
        proposer = make_proposer(
            config,
            self.draft,
            num_blocks=plan.num_blocks,
            num_host_blocks=plan.num_host_blocks,
            batch=batch,
            sampler=sampler,
            device=device,
        )
        runner = ModelRunner(
            model,
            loaded.attention_backend,
            kv_caches,
            host_caches,
            batch=batch,
            sampler=sampler,
            device=device,
            proposer=proposer,
        )
        return runner if self._link is None else self._link.settling(runner)

    def _no_memory(self, folder: Path, free_bytes: int) -> str:
        size = "" if self.config.load_format == "dummy" else f" ({mib(_checkpoint_bytes(folder))} as stored)"
        formats = "int8 or int4" if self._device.type == "cpu" else "int8, int4 or fp8"
        return (
            f"The weights of {folder.name}{size} do not fit into {mib(free_bytes)} of free memory: take --quantization {formats}, "
            "a smaller model, or stop what else uses the memory."
        )

    def fingerprint(self) -> dict[str, str]:
        """See description.fingerprint."""
        return fingerprint(self.config, self.loaded, self._device)

    def model_info(self, plan: KVPlan) -> ModelInfo:
        """This rank as a whole engine, with its own part's bytes."""
        return describe(self, plan, device=self._device, graphs=self._graphs)


def share_of_free_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes that a rank may count on before any is loaded: GPUs have memory of their own, CPU ranks of a machine share it."""
    return free_memory(device) // (local_ranks if device.type == "cpu" else 1)


def _check_stages(part: ModelPart, model: ModelConfig) -> None:
    if part.stage.count > model.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {part.stage.count} is above the model's {model.num_layers} layers; lower it."
        )


def _checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint_files(folder))
