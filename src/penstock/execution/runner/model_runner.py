"""The model runner: executes one step after another on one device.

What belongs here: the order of a step (apply the diff, forward, sample, propose, answer) and nothing else. What each part does lives
elsewhere: what is remembered of requests and how tensors are built in batch.py; tokens from logits in sampling/; guesses at the next
tokens in speculative/; memory in kv_memory.py; processes and threads in worker.py and steps.py. A feature that concerns one model, one
backend or one kind of request must not add a branch here: hide it behind the model, the backend, the sampler or the proposer.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.engine.step import RunnerOutput, SchedulerOutput
from penstock.execution.attention.backend import AttentionBackend, KVCache
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.runner.batch import PersistentBatch, StepInputs
from penstock.execution.runner.drafts import Proposals, step_masks, verified_drafts
from penstock.execution.runner.moves import move_blocks
from penstock.execution.runner.outputs import add_samples, add_verified, plan_prompt_logprobs, sampling_keys
from penstock.execution.sampling.logprobs import MAX_LOGITS_BYTES, prompt_token_logprobs
from penstock.execution.sampling.sampler import SampledRows, Sampler
from penstock.execution.sampling.verification import VerifiedTokens
from penstock.execution.speculative.proposer import Proposer


class Model(Protocol):
    """What the runner needs of a model."""

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions int64 [T] → hidden states [T, hidden_size], inside a forward context."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, hidden_size] → logits float32 [M, vocab_size]."""
        ...


class SlotSampler(Protocol):
    """What runners ask of a sampler beside sampling; see sampling.sampler.Sampler."""

    def add(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        sample_index: int,
        prompt: npt.NDArray[np.int32],
        output: npt.NDArray[np.int32],
    ) -> None: ...

    def remove(self, slot: int) -> None: ...


def forget_requests(
    step: SchedulerOutput, batch: PersistentBatch, sampler: SlotSampler, proposals: Proposals | None = None
) -> None:
    """Free the slots of those that are finished or preempted."""
    for keys in (step.finished_keys, step.preempted_keys):
        for key in keys:
            slot = batch.remove(key)
            if slot is not None:
                sampler.remove(slot)
                if proposals is not None:
                    proposals.remove(slot)


def add_requests(
    step: SchedulerOutput, batch: PersistentBatch, sampler: SlotSampler, proposals: Proposals | None = None
) -> list[int]:
    """Give those that are new a slot each, which are returned."""
    slots = []
    for new in step.new_requests:
        slot = batch.add(new)
        tokens = batch.token_ids(slot)
        sampler.add(
            slot,
            new.sampling,
            seed=new.seed,
            sample_index=new.sample_index,
            prompt=tokens[: new.num_prompt_tokens],
            output=tokens[new.num_prompt_tokens :],
        )
        if proposals is not None:
            proposals.add(slot, new)
        slots.append(slot)
    return slots


class ModelRunner:
    """Runs steps over a model, its KV caches (one per layer; `host_caches` likewise, empty without a host tier) and a persistent batch.
    `proposer`: where drafts come from; without one there are none.

    Not thread-safe: one thread executes all steps.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_caches: list[KVCache],
        host_caches: list[KVCache],
        *,
        batch: PersistentBatch,
        sampler: Sampler,
        device: torch.device,
        max_logits_bytes: int = MAX_LOGITS_BYTES,
        proposer: Proposer | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv_caches = kv_caches
        self._host_caches = host_caches
        self._batch = batch
        self._sampler = sampler
        self._device = device
        self._max_logits_bytes = max_logits_bytes
        self._proposals = Proposals(proposer, batch)

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """Execute a step in the order that engine/step.py gives.

        When it raises, the requests of this step are left out of all steps until the scheduler sends them anew; all others are
        unaffected. A request that fails alone is in `errors` and left out of later steps in the same way.
        """
        try:
            with torch.inference_mode():
                return self._execute(step)
        except BaseException:
            self._batch.set_broken(step.num_scheduled_tokens)
            raise

    def _execute(self, step: SchedulerOutput) -> RunnerOutput:
        begun = time.perf_counter()
        self._apply(step)
        output = RunnerOutput(step.step_id)
        inputs = self._batch.build(step.num_scheduled_tokens, step.draft_token_ids)
        if inputs is None:
            return output
        prepared = time.perf_counter()
        with forward_context(ForwardContext(inputs.attention, self._kv_caches)):
            hidden = self._model(inputs.input_ids, inputs.positions)
        self._batch.finish_step(inputs)
        self._add_prompt_logprobs(output, inputs, hidden)
        logits = None
        if len(inputs.sampling):
            every_token_samples = len(inputs.logit_rows) == len(hidden)
            logits = self._model.compute_logits(hidden if every_token_samples else hidden[inputs.logit_rows])
        forwarded = time.perf_counter()
        if logits is not None:
            self._sample(output, step, inputs, logits)
        output.prepare_seconds = prepared - begun
        output.forward_seconds = forwarded - prepared
        output.sample_seconds = time.perf_counter() - forwarded
        self._proposals.propose(step.num_proposals, output)
        return output

    def _apply(self, step: SchedulerOutput) -> None:
        """Take over what the step says of requests and blocks."""
        forget_requests(step, self._batch, self._sampler, self._proposals)
        move_blocks(step, self._backend, self._kv_caches, self._host_caches, self._device)
        self._proposals.move_blocks(step)
        add_requests(step, self._batch, self._sampler, self._proposals)
        self._proposals.add_blocks(self._batch.update(step.cached_requests))

    def _sample(self, output: RunnerOutput, step: SchedulerOutput, inputs: StepInputs, logits: Tensor) -> None:
        slots, masks = inputs.slots[inputs.sampling], step_masks(step, inputs)
        if inputs.num_drafts.any():
            drafts = verified_drafts(step, inputs)
            verified = self._sampler.verify(logits, slots, inputs.sample_positions, drafts, masks)
            self._take_verified(output, inputs, verified)
        else:
            sampled = self._sampler.sample(logits, slots, inputs.sample_positions, masks)
            self._take_samples(output, inputs, sampled)

    def _take_verified(self, output: RunnerOutput, inputs: StepInputs, verified: VerifiedTokens) -> None:
        """Append the tokens of requests of which some had drafts to the batch and to `output`."""
        add_verified(output, sampling_keys(inputs), verified)
        if output.errors:
            self._batch.set_broken(output.errors)
        for slot, token_ids in zip(inputs.slots[inputs.sampling].tolist(), verified.token_ids, strict=True):
            if token_ids:
                self._batch.extend(slot, token_ids)

    def _take_samples(self, output: RunnerOutput, inputs: StepInputs, sampled: SampledRows) -> None:
        """Append the sampled tokens to the batch and to `output`."""
        entries = [] if sampled.logprobs is None else sampled.logprobs.to_structs(sampled.num_top)
        add_samples(output, sampling_keys(inputs), sampled.token_ids, sampled.failed, sampled.logprob_rows, entries)
        slots, token_ids = inputs.slots[inputs.sampling], sampled.token_ids
        if output.errors:
            self._batch.set_broken(output.errors)
            slots, token_ids = slots[~sampled.failed], token_ids[~sampled.failed]
        self._batch.append(slots, token_ids)

    def _add_prompt_logprobs(self, output: RunnerOutput, inputs: StepInputs, hidden: Tensor) -> None:
        plan = plan_prompt_logprobs(self._batch, inputs)
        if plan is None:
            return
        entries = prompt_token_logprobs(
            hidden,
            plan.rows,
            plan.targets,
            plan.num_top,
            compute_logits=self._model.compute_logits,
            vocab_size=self._sampler.vocab_size,
            max_logits_bytes=self._max_logits_bytes,
        )
        plan.add_to(output, entries)
