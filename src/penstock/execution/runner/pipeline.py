"""The stages of a pipeline: what goes from one to the next, and what a stage that is not the last does with a step.

    stage 0   embed ─ layers ─┐ step 1  ┐ step 2  ┐ step 3
    stage 1                   └ layers ─ …        │           residual stream [T, hidden_size], one message per step
    last stage                          layers ─ norm ─ logits ─ sample ─▶ the executor

A stage sends and goes on with its next step at once. Exactly one message belongs to every step that has tokens: a stage that fails sends
zeros in place of its result, and one that fails before it received takes the message and drops it, so that a failed step never shifts
the messages of the steps behind it. Whoever answers for the step hears of the failure from the stage itself.

The last stage is an ordinary runner whose model begins with what came. The other stages learn sampled tokens from the executor, later:
see StageRunner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.engine.step import RequestKey, RunnerOutput, SchedulerOutput
from penstock.execution.attention.backend import AttentionBackend, KVCache
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.moves import move_blocks
from penstock.execution.runner.steps import StepRunner

# Messages on their way from one stage, whose memory has to stay; steps in flight are few, so that more are a sign of a stage that is gone.
_MAX_UNDERWAY = 8


class StageModel(Protocol):
    """What stages need of a model: see CausalLM."""

    def __call__(self, input_ids: Tensor, positions: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


class StageLink:
    """The residual stream's way in and out of a stage. `previous`, `next`: the ranks of the stages beside this one in the default process
    group, None at the ends. Call `begin` before each step and `settle` after one that failed."""

    def __init__(
        self, previous: int | None, next: int | None, *, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._previous = previous
        self._next = next
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._underway: deque[tuple[dist.Work, Tensor]] = deque()
        self._num_tokens = 0
        self._received = True
        self._sent = True

    def begin(self, num_tokens: int) -> None:
        """A step of `num_tokens` tokens begins; without tokens no stage has anything to say."""
        self._num_tokens = num_tokens
        self._received = self._previous is None or not num_tokens
        self._sent = self._next is None or not num_tokens

    def receive(self) -> Tensor | None:
        """What the stage before made of the step [T, hidden_size]; None at the first stage. Raises RuntimeError when it is gone."""
        if self._previous is None:
            return None
        residual = self._empty()
        dist.recv(residual, src=self._previous)
        self._received = True
        return residual

    def send(self, residual: Tensor) -> None:
        """Give this stage's result to the next one, without waiting for it."""
        if self._next is None:
            return
        residual = residual.contiguous()
        work = dist.isend(residual, dst=self._next)
        self._sent = True
        if work is not None:
            self._underway.append((work, residual))
        while len(self._underway) > _MAX_UNDERWAY or (self._underway and self._underway[0][0].is_completed()):
            self._underway.popleft()[0].wait()

    def settle(self) -> None:
        """After a failed step: take what was not received, and send zeros for what was not sent."""
        if not self._received:
            self.receive()
        if not self._sent:
            self.send(self._empty().zero_())

    def close(self) -> None:
        """Wait until everything that was sent has been taken."""
        while self._underway:
            self._underway.popleft()[0].wait()

    def settling(self, runner: StepRunner) -> SettlingRunner:
        """`runner`, whose model takes from this link, with the link's messages kept in order."""
        return SettlingRunner(runner, self)

    def _empty(self) -> Tensor:
        return torch.empty(self._num_tokens, self._hidden_size, dtype=self._dtype, device=self._device)


class LaterStage:
    """The last stage's part of a model, for a runner that knows nothing of stages."""

    def __init__(self, model: StageModel, link: StageLink) -> None:
        self._model = model
        self._link = link

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self._model(input_ids, positions, self._link.receive())

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._model.compute_logits(hidden)


class SettlingRunner:
    """A runner in a pipeline: its link is told where steps begin, and what is left of one that failed is settled."""

    def __init__(self, runner: StepRunner, link: StageLink) -> None:
        self._runner = runner
        self._link = link

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        self._link.begin(step.total_tokens)
        try:
            return self._runner.execute(step)
        except Exception:
            self._link.settle()
            raise


class StageRunner:
    """Runs steps over a stage that is not the last: applies the diff, computes the stage's layers and hands on the residual stream.

    It samples nothing. Before a step in which a request goes on, `learn` tells what was sampled for it; the scheduler never puts a request
    into a step while another one of it is in flight. Not thread-safe.
    """

    def __init__(
        self,
        model: StageModel,
        backend: AttentionBackend,
        kv_caches: list[KVCache],
        host_caches: list[KVCache],
        *,
        batch: PersistentBatch,
        device: torch.device,
        link: StageLink,
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv_caches = kv_caches
        self._host_caches = host_caches
        self._batch = batch
        self._device = device
        self._link = link

    def learn(self, sampled_token_ids: Mapping[RequestKey, Sequence[int]]) -> None:
        """Tokens that the last stage has sampled; those of requests that are gone by now are ignored."""
        for key, token_ids in sampled_token_ids.items():
            if key in self._batch and token_ids:
                self._batch.extend(self._batch.request(key).slot, token_ids)

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """See ModelRunner; the output says nothing but that the step has run."""
        self._link.begin(step.total_tokens)
        try:
            with torch.inference_mode():
                self._execute(step)
        except Exception:
            self._batch.set_broken(step.num_scheduled_tokens)
            self._link.settle()
            raise
        return RunnerOutput(step.step_id)

    def _execute(self, step: SchedulerOutput) -> None:
        for keys in (step.finished_keys, step.preempted_keys):
            for key in keys:
                self._batch.remove(key)
        move_blocks(step, self._backend, self._kv_caches, self._host_caches, self._device)
        for new in step.new_requests:
            self._batch.add(new)
        self._batch.update(step.cached_requests)
        inputs = self._batch.build(step.num_scheduled_tokens, step.draft_token_ids)
        if inputs is None:
            return
        with forward_context(ForwardContext(inputs.attention, self._kv_caches)):
            residual = self._model(inputs.input_ids, inputs.positions, self._link.receive())
        self._batch.finish_step(inputs)
        self._link.send(residual)
