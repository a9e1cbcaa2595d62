"""The executor of a real model in one process, on one device.

Starting one is the start of an engine: settings are resolved, weights loaded, memory sized and taken, and a small prefill and decode run,
so that whoever comes first does not pay for it. What a process does with its model is in worker.py; with several ranks the same worker
runs in processes of its own, see parallel_executor.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from penstock.core.config import EngineConfig
from penstock.core.types import ModelInfo
from penstock.engine.executor import KVCapacity, SpeculationProfile, StepHandle
from penstock.engine.step import SchedulerOutput
from penstock.execution.runner.draft_lengths import speculation_profile
from penstock.execution.runner.rehearsal import small_steps
from penstock.execution.runner.worker import ModelWorker

logger = logging.getLogger(__name__)


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
        worker = self._worker = ModelWorker(config, folder, max_inflight=max_inflight, progress=progress)
        plan = worker.plan()
        worker.begin(plan)
        self.config = worker.config
        self.timeline = worker.timeline
        self.max_inflight = worker.max_inflight
        self.micro_batches = 1
        self.speculation: SpeculationProfile | None = speculation_profile(self.config)
        self._capacity = KVCapacity(plan.num_blocks, self.config.block_size, plan.bytes_per_block, plan.num_host_blocks)
        self._model_info = worker.model_info(plan)
        start = time.perf_counter()
        warm_up(self.submit, self.config, plan.num_blocks)
        self.timeline.append(("warm-up", time.perf_counter() - start))
        worker.write_weight_cache()

    def submit(self, step: SchedulerOutput) -> StepHandle:
        return self._worker.submit(step)

    def kv_capacity(self) -> KVCapacity:
        return self._capacity

    def model_info(self) -> ModelInfo:
        return self._model_info

    def shutdown(self) -> None:
        """Wait for the steps in flight, then release the model and the cache. Idempotent."""
        self._worker.close()


def warm_up(submit: Callable[[SchedulerOutput], StepHandle], config: EngineConfig, num_blocks: int) -> None:
    """One small prefill and decode; a request of these that fails is told, and is no reason not to start."""
    for step in small_steps(config, num_blocks):
        for error in submit(step).result().errors.values():
            logger.warning("the warm-up request failed: %s", error)
