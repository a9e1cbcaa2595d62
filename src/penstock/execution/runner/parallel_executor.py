"""The executor of a model on several ranks: this process sends steps, the ranks execute them.

    engine's process       ParallelExecutor ── RunStep ──▶ every rank           the same bytes to all, encoded once
                                     ▲
                                     └──────── Finished ── first rank of the last stage
    ranks                  tensor parallel: the same step, a share of every layer, sums and gathers between them
                           pipeline: stage after stage, the residual stream goes from one to the next

Sampling is done by every rank of the last stage, from the same logits with the same random numbers, so that nobody has to be told. Stages
before the last are told with a later step. Nothing here imports torch.

When a rank ends, the others wait for it in operations that never end: the group is over. All steps in flight raise an IntegrityError that
says which rank ended and how, and all ranks are ended; whoever keeps the engine starts a new one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, IntegrityError, PenstockError
from penstock.core.types import ModelInfo
from penstock.engine.executor import KVCapacity, SpeculationProfile, StepHandle
from penstock.engine.step import RunnerOutput, SchedulerOutput
from penstock.execution.runner.draft_lengths import speculation_profile
from penstock.execution.runner.rank_group import RankGroup
from penstock.execution.runner.rank_messages import (
    Allocate,
    Failed,
    Finished,
    FromRank,
    Loaded,
    Ready,
    RunStep,
    Start,
    Stop,
    Stopped,
    StoreOpened,
    encode,
)
from penstock.execution.runner.rehearsal import small_steps
from penstock.execution.runner.step_ledger import StepLedger

logger = logging.getLogger(__name__)

# Importing torch on a busy machine; then a model of hundreds of GB from a slow disk, or kernels to compile.
_PROCESS_START_S = 300.0
_LOAD_S = 1800.0
_STOP_S = 10.0
_WATCH_INTERVAL_S = 0.5
LOOPBACK = "127.0.0.1"


class ParallelExecutor:
    """One model on tensor_parallel_size × pipeline_parallel_size ranks.

    group: processes to use, which live on after `shutdown` and can take another model then; None: as `config` says, ended with
    `shutdown`. folder: the model on this machine. on_gone: called once, in another thread, when ranks end by themselves, also while no step
    is in flight. config: the settings, with everything resolved. timeline: (phase, seconds) of the start.
    Raises ConfigError or ModelFormatError when it cannot start, IntegrityError when a rank ends meanwhile; no rank is left then.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        *,
        group: RankGroup | None = None,
        on_gone: Callable[[str], None] | None = None,
        progress: bool = False,
    ) -> None:
        self.timeline: list[tuple[str, float]] = []
        self.speculation: SpeculationProfile | None = speculation_profile(config)
        self._given = config
        self._owns_group = group is None
        self._on_gone = on_gone
        self._closing = False
        self._ledger = StepLedger(config.tensor_parallel_size, config.pipeline_parallel_size)
        with self._phase("ranks"):
            self._group = group if group is not None else _start_group(config)
        try:
            self._load(folder, progress)
            self._watch = threading.Thread(target=self._listen, name="penstock-ranks", daemon=True)
            self._watch.start()
            with self._phase("warm-up"):
                self._warm_up()
        except BaseException:
            self._group.close()
            raise

    # ---- the executor protocol ----

    def submit(self, step: SchedulerOutput) -> StepHandle:
        """See Executor. Raises IntegrityError when a rank has ended, and after `shutdown`."""
        number, future, news = self._ledger.open()
        encoded = encode(RunStep(number, step, news))
        for rank in self._group.ranks:
            rank.send(encoded)
        return _RankStep(future)

    def kv_capacity(self) -> KVCapacity:
        return self._capacity

    def model_info(self) -> ModelInfo:
        return self._model_info

    def shutdown(self) -> None:
        """Wait for the steps in flight, then release the model; end the ranks, unless they were given. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._group.send(Stop())
        self._watch.join(_STOP_S)
        self._ledger.close("a step was submitted to an executor that was shut down")
        if self._owns_group or self._watch.is_alive():
            self._group.close()
        self._watch.join(_STOP_S)

    # ---- the start ----

    def _load(self, folder: Path, progress: bool) -> None:
        every_rank = range(len(self._group))
        with self._phase("load"):
            self._send_starts(folder, progress)
            loaded = self._group.gather(Loaded, every_rank, self._name, _LOAD_S)
        _check_alike(loaded)
        self.config = loaded[self._ledger.output_rank].settings
        num_blocks = min(answer.num_blocks for answer in loaded)
        num_host_blocks = min(answer.num_host_blocks for answer in loaded)
        with self._phase("kv cache"):
            self._group.send(Allocate(num_blocks, num_host_blocks))
            ready = self._group.gather(Ready, every_rank, self._name, _LOAD_S)
        bytes_per_block = sum(answer.bytes_per_block for answer in loaded)
        self._capacity = KVCapacity(num_blocks, self.config.block_size, bytes_per_block, num_host_blocks)
        self.max_inflight = loaded[self._ledger.output_rank].max_inflight
        self.micro_batches = self._given.pipeline_parallel_size
        self._model_info = self._describe(ready)

    def _send_starts(self, folder: Path, progress: bool) -> None:
        """Tell every rank what it is. The first one opens the store through which they find each other."""
        ranks, size = self._group.ranks, self._given.tensor_parallel_size
        address = next((rank.address for rank in ranks if rank.address), LOOPBACK)
        run, store = secrets.token_hex(8), ""
        for index, rank in enumerate(ranks):
            stage = ranks[index // size * size :][:size]
            start = Start(
                rank=index,
                settings=self._given,
                folder="" if rank.host else str(folder),
                local_rank=rank.local_rank,
                local_ranks=sum(other.host == rank.host for other in ranks),
                run=run,
                store=store,
                address="" if rank.host else address,
                one_machine=len({other.host for other in stage}) == 1,
                progress=progress and index == 0,
            )
            rank.send(encode(start))
            if not index:
                store = self._group.gather(StoreOpened, [0], self._name, _PROCESS_START_S)[0].address

    def _describe(self, ready: Sequence[Ready]) -> ModelInfo:
        infos = [answer.info for answer in ready]
        answering = self._ledger.output_rank
        self.timeline += [(f"rank {answering}: {phase}", seconds) for phase, seconds in ready[answering].timeline]
        return msgspec.structs.replace(
            infos[answering],
            weight_bytes=sum(info.weight_bytes for info in infos),
            kv_cache_bytes=self._capacity.num_blocks * self._capacity.bytes_per_block,
            max_inflight_steps=self.max_inflight,
        )

    def _warm_up(self) -> None:
        for step in small_steps(self.config, self._capacity.num_blocks):
            for error in self.submit(step).result().errors.values():
                logger.warning("the warm-up request failed: %s", error)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timeline.append((name, time.perf_counter() - start))

    def _name(self, index: int) -> str:
        """'rank 1 of 4 (tensor rank 1, stage 0)', with its machine if that is another one."""
        stage, tensor_rank = divmod(index, self._given.tensor_parallel_size)
        host = self._group.ranks[index].host
        place = f" on {host}" if host else ""
        return f"rank {index} of {len(self._group)} (tensor rank {tensor_rank}, stage {stage}){place}"

    # ---- while it runs ----

    def _listen(self) -> None:
        """Take what ranks say until all have stopped or one has ended. Runs in a thread of its own."""
        running = set(range(len(self._group)))
        try:
            while running:
                for index, message in self._group.poll(_WATCH_INTERVAL_S):
                    if isinstance(message, Stopped):
                        running.discard(index)
                    else:
                        self._take(index, message)
                if (reason := self._ledger.stuck()) is not None:
                    raise IntegrityError(reason)
        except PenstockError as error:
            self._give_up(str(error))
        except Exception as error:
            logger.exception("listening to the ranks failed")
            self._give_up(f"listening to the ranks failed ({type(error).__name__})")

    def _take(self, index: int, message: FromRank | None) -> None:
        match message:
            case Finished(number, output):
                self._ledger.finished(number, output)
            case Failed():
                self._ledger.failed(index, message)
            case None:
                how = self._group.ranks[index].how_it_ended()
                raise IntegrityError(f"{self._name(index)} died: {how}; the others cannot go on without it")
            case _:
                raise IntegrityError(f"{self._name(index)} said {type(message).__name__} while steps ran")

    def _give_up(self, reason: str) -> None:
        """The group is over: who waits for a step hears why, and the ranks that hang are ended."""
        if not self._closing:
            logger.error("%s", reason)
        self._ledger.close(reason)
        self._group.close()
        if not self._closing and self._on_gone is not None:
            self._on_gone(reason)


class _RankStep:
    """A step that ranks execute."""

    def __init__(self, future: Future[RunnerOutput]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> RunnerOutput:
        return self._future.result()


def _start_group(config: EngineConfig) -> RankGroup:
    """The processes that `config` asks for: those of this machine, and those that join from others."""
    local = config.local_ranks or config.num_ranks
    group = RankGroup.start(local)
    if local == config.num_ranks:
        if config.worker_address:
            logger.warning(
                "--worker-address is not used: all %d ranks run here unless --local-ranks says otherwise", local
            )
        return group
    from penstock.execution.runner.rank_join import await_ranks

    try:
        group.ranks += await_ranks(config, config.num_ranks - local)
    except BaseException:
        group.close()
        raise
    return group


def _check_alike(loaded: Sequence[Loaded]) -> None:
    """Raise ConfigError when ranks would not come to the same results."""
    first = loaded[0].fingerprint
    for index, answer in enumerate(loaded):
        for what, value in answer.fingerprint.items():
            if value != first.get(what):
                raise ConfigError(
                    f"ranks must be alike, but rank 0 has {what} {first.get(what)!r} and rank {index} has {value!r}; use machines and "
                    "installations that are the same."
                )
