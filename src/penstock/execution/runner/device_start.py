"""Getting a model to run on an accelerator: buffers, memory measured instead of guessed, CUDA graphs.

The order makes every number known before it is needed:

    weights ─ buffers of the batch ─ full steps over a cache of one block ─ a few graphs over it ─ KV cache ─ all graphs
              what is taken so far   what a step takes for its time         what graphs will take   the rest

Full steps and graphs run the real code over real shapes, and so they also compile the kernels of those shapes. With a draft model the KV
cache is both models'; its passes run without graphs, and take less than the full step that they never run beside.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import IntegrityError
from penstock.engine.executor import StepHandle
from penstock.engine.step import SchedulerOutput
from penstock.execution.attention.backend import KVCache
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.accelerator import Accelerator, CudaAccelerator, HostAccelerator
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.cuda_graphs import DEFAULT_MAX_BATCH_SIZE
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.device_runner import DeviceRunner
from penstock.execution.runner.draft_lengths import max_draft_tokens
from penstock.execution.runner.kv_memory import KVPlan, MemoryUse, activation_bytes, allocate_kv_caches
from penstock.execution.runner.out_of_memory import memory_must_suffice, mib
from penstock.execution.runner.rehearsal import full_steps, proposal_steps, varied_steps, verification_steps
from penstock.execution.runner.speculation import make_proposer
from penstock.execution.runner.step_graphs import StepGraphs, verification_lengths
from penstock.execution.sampling.device_sampler import DeviceSampler
from penstock.execution.speculative.proposer import Proposer

logger = logging.getLogger(__name__)


def make_accelerator(device: torch.device) -> Accelerator:
    """The queue of work of `device`; a CPU stands for an accelerator."""
    return HostAccelerator() if device.type == "cpu" else CudaAccelerator(device)


class DeviceStart:
    """The start of one model on one accelerator, in the order of the methods.

    max_slots: requests that are known at a time; max_inflight: steps; free_bytes: before the weights were loaded; draft: the draft model,
    if there is one. Raises ConfigError when memory runs out.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        accelerator: Accelerator,
        *,
        max_slots: int,
        max_inflight: int,
        free_bytes: int,
        draft: LoadedModel | None = None,
    ) -> None:
        self._config = config
        self._loaded = loaded
        self._accelerator = accelerator
        self._free_bytes = free_bytes
        self._draft = draft
        self._max_drafts = max_draft_tokens(config)
        self._proposer: Proposer | None = None
        device, model = accelerator.device, loaded.config
        with memory_must_suffice(self._no_memory_for_a_step):
            loaded.model.prepare(config.max_model_len)
            self._batch = PersistentBatch(max_slots, config.max_model_len, config.block_size, device)
            self._device_batch = DeviceBatch(
                accelerator,
                max_slots=max_slots,
                max_requests=config.max_num_seqs,
                max_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                block_size=config.block_size,
                max_inflight=max_inflight,
                max_drafts=self._max_drafts,
            )
            self._sampler = DeviceSampler(model.vocab_size, max_slots, device, model.eos_token_ids)
            self.graphs = self._make_graphs()

    def measure(self) -> MemoryUse:
        """Run full steps and record a few graphs, and see what they take. Raises ConfigError when memory runs out."""
        config, accelerator = self._config, self._accelerator
        logger.info("running full steps; kernels that are new to this machine are compiled, which takes a while once")
        with memory_must_suffice(self._no_memory_for_a_step):
            kv_caches, _ = self._allocate(KVPlan(1, 0, 0))
            runner = self._make_runner(kv_caches, [], None)
            full = [*full_steps(config), *verification_steps(config, self._max_drafts, config.max_num_seqs)]
            step_bytes = accelerator.peak_bytes(lambda: _run(runner, full))
            if step_bytes:
                _run(runner, varied_steps(config))
                for num_drafts in range(1, self._max_drafts + 1):
                    _run(runner, verification_steps(config, num_drafts, num_requests=1))
        if not step_bytes:
            step_bytes = activation_bytes(config, self._loaded.config, self._loaded.activation_dtype, self._max_drafts)
            return MemoryUse(self._free_bytes, self._weight_bytes, step_bytes)
        # Counted now, because code that was loaded and workspaces that were made meanwhile stay.
        taken = max(0, self._free_bytes - accelerator.free_bytes())
        graph_bytes = self.graphs.measure(kv_caches) if self.graphs is not None else 0
        use = MemoryUse(self._free_bytes, taken, step_bytes, graph_bytes, measured=True)
        logger.info(
            "memory: of %s free, weights and buffers take %s, a full step %s, CUDA graphs about %s",
            *(mib(size) for size in (use.free_bytes, use.weight_bytes, use.step_bytes, use.graph_bytes)),
        )
        return use

    def allocate(self, plan: KVPlan) -> tuple[list[KVCache], list[KVCache]]:
        """The caches of the device and of the host tier, with a draft model's beside them. Raises ConfigError when they do not fit after
        all."""
        with memory_must_suffice(lambda: self._no_memory_for_the_cache(plan)):
            caches = self._allocate(plan)
            self._proposer = make_proposer(
                self._config,
                self._draft,
                num_blocks=plan.num_blocks,
                num_host_blocks=plan.num_host_blocks,
                batch=self._batch,
                sampler=self._sampler,
                device=self._accelerator.device,
            )
        return caches

    def start(self, kv_caches: list[KVCache], host_caches: list[KVCache], *, progress: bool) -> DeviceSteps:
        """Record all graphs, and be ready for steps."""
        if self.graphs is not None:
            self.graphs.capture(kv_caches, progress=progress)
        runner = self._make_runner(kv_caches, host_caches, self.graphs)
        if self._draft is not None:
            # Its kernels are compiled now, and not when somebody waits.
            _run(runner, proposal_steps(self._config, self._max_drafts, kv_caches[0].num_blocks))
        return DeviceSteps(runner, self._accelerator)

    @property
    def graphs_text(self) -> str:
        """Which graphs there are, or why there are none."""
        if self.graphs is not None:
            return self.graphs.account
        if self._config.enforce_eager:
            return "no CUDA graphs (--enforce-eager)"
        return f"no CUDA graphs (attention by {self._loaded.attention_backend.name} cannot be captured)"

    @property
    def _weight_bytes(self) -> int:
        return self._loaded.weight_bytes + (self._draft.weight_bytes if self._draft is not None else 0)

    def _make_graphs(self) -> StepGraphs | None:
        config, loaded = self._config, self._loaded
        if config.enforce_eager or not loaded.attention_backend.supports_graphs:
            return None
        largest = min(config.cuda_graph_max_batch_size or DEFAULT_MAX_BATCH_SIZE, config.max_num_seqs)
        return StepGraphs(
            loaded.model,
            self._device_batch,
            self._accelerator,
            largest=largest,
            max_seq_len=config.max_model_len,
            vocab_size=loaded.config.vocab_size,
            lengths=verification_lengths(self._max_drafts, adaptive=not config.num_speculative_tokens),
        )

    def _make_runner(
        self, kv_caches: list[KVCache], host_caches: list[KVCache], graphs: StepGraphs | None
    ) -> DeviceRunner:
        return DeviceRunner(
            self._loaded.model,
            kv_caches,
            host_caches,
            batch=self._batch,
            buffers=self._device_batch,
            sampler=self._sampler,
            accelerator=self._accelerator,
            graphs=graphs,
            proposer=self._proposer,
        )

    def _allocate(self, plan: KVPlan) -> tuple[list[KVCache], list[KVCache]]:
        loaded = self._loaded
        return allocate_kv_caches(
            plan, loaded.cache_spec, loaded.num_layers, loaded.attention_backend, self._accelerator.device
        )

    def _no_memory_for_a_step(self) -> str:
        config = self._config
        return (
            f"A step of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} requests does not fit beside the weights "
            f"({mib(self._weight_bytes)} of {mib(self._free_bytes)}): lower --max-num-batched-tokens or --max-num-seqs, or take "
            "fewer bits a weight (--quantization int8, int4 or fp8) or a smaller model."
        )

    def _no_memory_for_the_cache(self, plan: KVPlan) -> str:
        return (
            f"The KV cache of {mib(plan.num_blocks * plan.bytes_per_block)} does not fit, with {mib(self._accelerator.free_bytes())} free: "
            "lower --kv-cache-gib or --memory-utilization."
        )


class DeviceSteps:
    """Steps of a DeviceRunner, which never waits for the device when it takes one."""

    def __init__(self, runner: DeviceRunner, accelerator: Accelerator) -> None:
        self._runner: DeviceRunner | None = runner
        self._accelerator = accelerator

    def submit(self, step: SchedulerOutput) -> StepHandle:
        if self._runner is None:
            raise IntegrityError("a step was submitted to an executor that was shut down")
        return self._runner.launch(step)

    def close(self) -> None:
        """Wait for the steps in flight, then release model and caches. Idempotent."""
        if self._runner is not None:
            # A device that is lost says so here as well, but whoever needs to know has been told by a step.
            with suppress(RuntimeError):
                self._accelerator.mark().wait()
        self._runner = None


def _run(runner: DeviceRunner, steps: list[SchedulerOutput]) -> None:
    for step in steps:
        runner.execute(step)
