"""What the process of a rank does: whatever the executor at the other end of its connection says, one model after another.

See rank_messages.py for the order of messages, worker.py for what a rank is.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from penstock.core.errors import ConfigError, IntegrityError, PenstockError
from penstock.core.framing import FrameSocket
from penstock.engine.executor import StepHandle
from penstock.execution.runner.kv_memory import KVPlan
from penstock.execution.runner.limits import resolve_device
from penstock.execution.runner.out_of_memory import is_out_of_memory
from penstock.execution.runner.rank_messages import (
    Allocate,
    Failed,
    Finished,
    FromRank,
    Loaded,
    Ready,
    RunStep,
    Start,
    StartFailed,
    Stop,
    Stopped,
    StoreOpened,
    ToRank,
    decode_to_rank,
    encode,
)
from penstock.execution.runner.rendezvous import Rendezvous
from penstock.execution.runner.worker import ModelWorker, share_of_free_memory

logger = logging.getLogger(__name__)

# A look for the next step while the device works on this one, and how long it makes sense to look: the executor either sends it at once,
# or waits for the answer to this one.
_LOOK_S = 0.0001
_LOOK_LONGEST_S = 0.01
_NO_MEMORY = (
    "There is not enough memory for a rank: lower --kv-cache-gib, --max-num-seqs or --max-num-batched-tokens, "
    "or choose a smaller model."
)


class RankServer:
    """Answers one connection. `folder`: where the model is, when the executor does not know."""

    def __init__(self, frames: FrameSocket, folder: str) -> None:
        self._frames = frames
        self._folder = folder
        self._rendezvous = Rendezvous()
        self._worker: ModelWorker | None = None
        self._answers = True
        self._bytes_per_block = 0
        self._inflight: deque[tuple[int, StepHandle]] = deque()

    def run(self) -> None:
        """Serve until the connection ends."""
        while (message := self._next()) is not None:
            match message:
                case Start():
                    self._attempt(partial(self._start, message))
                case Allocate():
                    self._attempt(partial(self._allocate, message))
                case RunStep():
                    self._submit(message)
                case Stop():
                    self._stop()

    def _send(self, message: FromRank) -> None:
        self._frames.send(encode(message))

    def _next(self) -> ToRank | None:
        """The next message; steps in flight are answered as they get done. On a device that works behind the host's back the next step is
        launched as soon as it comes, up to as many as may be in flight."""
        patience = time.monotonic() + _LOOK_LONGEST_S
        while self._inflight:
            full = self._worker is None or len(self._inflight) >= self._worker.max_inflight
            if full or self._inflight[0][1].done() or time.monotonic() > patience:
                self._answer(*self._inflight.popleft())
            elif self._frames.wait(_LOOK_S):
                break
        message = self._frames.receive()
        return None if message is None else decode_to_rank(message)

    # ---- the start ----

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run a part of the start; what goes wrong is told."""
        try:
            action()
        except PenstockError as error:
            self._send(StartFailed(type(error).__name__, str(error)))
        except Exception as error:
            if is_out_of_memory(error):
                self._send(StartFailed(ConfigError.__name__, _NO_MEMORY))
                return
            logger.exception("a rank cannot start")
            self._send(
                StartFailed("", f"a rank cannot start ({type(error).__name__}: {error}); its messages are above")
            )

    def _start(self, start: Start) -> None:
        device = resolve_device(start.settings.device, start.local_rank)
        # Before any rank of this machine loads anything: all of them have to come before the groups are there.
        free_bytes = share_of_free_memory(device, start.local_ranks)
        address = start.address or self._frames.socket.getsockname()[0]
        if start.rank == 0:
            self._send(StoreOpened(self._rendezvous.open_store(address)))
        part, place = self._rendezvous.join(start, address, device)
        folder = Path(start.folder or self._folder)
        worker = ModelWorker(
            start.settings, folder, part=part, place=place, free_bytes=free_bytes, progress=start.progress
        )
        plan = worker.plan()
        self._worker = worker
        self._answers = part.stage.is_last and part.tensor.rank == 0
        self._bytes_per_block = plan.bytes_per_block
        self._send(
            Loaded(
                settings=worker.config,
                max_inflight=worker.max_inflight,
                fingerprint=worker.fingerprint(),
                num_blocks=plan.num_blocks,
                num_host_blocks=plan.num_host_blocks,
                bytes_per_block=plan.bytes_per_block,
            )
        )

    def _allocate(self, allocate: Allocate) -> None:
        worker = self._loaded_worker()
        plan = KVPlan(allocate.num_blocks, allocate.num_host_blocks, self._bytes_per_block)
        worker.begin(plan)
        self._send(Ready(info=worker.model_info(plan), timeline=worker.timeline))
        worker.write_weight_cache()

    def _loaded_worker(self) -> ModelWorker:
        if self._worker is None:
            raise IntegrityError("a rank was told to work before it was told to start")
        return self._worker

    # ---- steps ----

    def _submit(self, message: RunStep) -> None:
        worker = self._loaded_worker()
        worker.learn(message.sampled_token_ids)
        self._inflight.append((message.number, worker.submit(message.step)))

    def _answer(self, number: int, handle: StepHandle) -> None:
        """Every rank tells of failures, one of results."""
        try:
            output = handle.result()
        except Exception as error:
            logger.exception("step %d failed", number)
            self._send(Failed(number, f"{type(error).__name__}: {error}", isinstance(error, IntegrityError)))
            return
        if self._answers:
            self._send(Finished(number, output))

    def _stop(self) -> None:
        while self._inflight:
            self._answer(*self._inflight.popleft())
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            gc.collect()
        self._rendezvous.leave()
        self._send(Stopped())
