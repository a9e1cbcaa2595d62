"""The model runner of an accelerator: steps are launched one after the other, and their results taken when they are wanted.

    host     launch N ──▶ launch N+1 ──▶ result N ─▶ scheduling ─▶ launch N+2 ──▶ result N+1 …
    device           [ step N                 ][ step N+1                  ][ step N+2 …

A launch gives the device a step's work and waits for nothing. What step N samples stays on the device, where N+1 finds it; the host counts
the token at the launch and learns which one it is with the result. So a request that fails alone in N, with no usable
probabilities, is found out after N+1 was launched with it: N+1 computes on with token 0 for it, in its own blocks, and says nothing of it.

How many of its drafts a request was right about is known with the result, and so is what to propose next: a request with either is in no
later step by then, while those of other requests go on. Drafts are proposed when the result is taken, with the device's work behind it.

What belongs here: the order of a step, as in model_runner.py. Buffers and what crosses between host and device: device_batch.py; recorded
steps: step_graphs.py; proposals: drafts.py; tokens from logits: sampling/device_sampler.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.engine.executor import StepHandle
from penstock.engine.step import RunnerOutput, SchedulerOutput
from penstock.execution.attention.backend import KVCache
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.runner.accelerator import Accelerator, Mark
from penstock.execution.runner.batch import PersistentBatch, StepShape
from penstock.execution.runner.block_mover import BlockMover
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.device_parts import Graphs, LaunchingSampler
from penstock.execution.runner.device_results import drop_failed, take_samples
from penstock.execution.runner.drafts import Proposals, step_masks, verified_drafts
from penstock.execution.runner.flight import FetchedLogprobs, Flight, LaunchedStep
from penstock.execution.runner.model_runner import Model, add_requests, forget_requests
from penstock.execution.runner.out_of_memory import is_out_of_memory, recover_memory
from penstock.execution.runner.outputs import plan_prompt_logprobs
from penstock.execution.runner.staging import Section
from penstock.execution.runner.steps import FinishedStep
from penstock.execution.sampling.logprobs import MAX_LOGITS_BYTES, logprob_tensors
from penstock.execution.speculative.proposer import Proposer


class DeviceRunner:
    """Runs steps over a model, its KV caches (one per layer; `host_caches` likewise, empty without a host tier) and a batch, of which
    `batch` is the host's half and `buffers` the device's. `proposer`: where drafts come from; without one there are none.

    Results are taken in the order of the launches. Not thread-safe.
    """

    def __init__(
        self,
        model: Model,
        kv_caches: list[KVCache],
        host_caches: list[KVCache],
        *,
        batch: PersistentBatch,
        buffers: DeviceBatch,
        sampler: LaunchingSampler,
        accelerator: Accelerator,
        graphs: Graphs | None = None,
        max_logits_bytes: int = MAX_LOGITS_BYTES,
        proposer: Proposer | None = None,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._mover = BlockMover(kv_caches, host_caches, accelerator.device)
        self._batch = batch
        self._buffers = buffers
        self._sampler = sampler
        self._accelerator = accelerator
        self._graphs = graphs
        self._max_logits_bytes = max_logits_bytes
        self._proposals = Proposals(proposer, batch)
        self._flights: deque[Flight] = deque()
        self._last_end: Mark | None = None

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """Launch a step and wait for it."""
        return self.launch(step).result()

    def launch(self, step: SchedulerOutput) -> StepHandle:
        """Give the device the work of a step, in the order that engine/step.py gives, and wait for none of it.

        What goes wrong is raised by the handle's `result`: IntegrityError when the device is lost, which ends the engine. After any other
        error the requests of this step are left out of all steps until the scheduler sends them anew, and all others are unaffected.
        """
        try:
            with torch.inference_mode():
                return LaunchedStep(self._launch(step), self._take)
        except Exception as error:
            self._batch.set_broken(step.num_scheduled_tokens)
            return FinishedStep(self._explained(error))
        except BaseException:
            self._batch.set_broken(step.num_scheduled_tokens)
            raise

    def _take(self, flight: Flight) -> RunnerOutput:
        """Wait for a launched step and say what it produced."""
        self._flights.remove(flight)
        try:
            if flight.end is None:
                raise IntegrityError("a step without an end was launched")
            flight.end.wait()
            return self._finished(flight)
        except Exception as error:
            if flight.shape is not None:
                current = self._batch.incarnations[flight.shape.slots] == flight.incarnations
                self._batch.set_broken(flight.shape.keys[row] for row in np.flatnonzero(current).tolist())
            explained = self._explained(error)
            if explained is not error:
                raise explained from error
            raise

    # ---- to the device ----

    def _launch(self, step: SchedulerOutput) -> Flight:
        begun = time.perf_counter()
        buffers = self._buffers
        if len(self._flights) >= buffers.max_inflight:
            raise IntegrityError(f"{len(self._flights)} steps are in flight; take the result of the oldest")
        flight = Flight(RunnerOutput(step.step_id), num_proposals=step.num_proposals)
        buffers.begin()
        self._apply(step)
        shape = flight.shape = self._batch.shape(step.num_scheduled_tokens, step.draft_token_ids)
        if shape is not None:
            buffers.add_drafts(shape, step.draft_token_ids)
        moves = self._pack_moves(step)
        prompt_sections = self._plan_prompt_logprobs(flight)

        flight.start = self._accelerator.mark()
        buffers.upload(shape)
        for move, packed in moves:
            move(buffers.view(packed).view(-1, 2))
        if shape is not None:
            flight.incarnations = self._batch.incarnations[shape.slots]
            self._run(flight, step, shape, prompt_sections, begun)
        flight.end = self._accelerator.mark()
        buffers.finish(flight.end)
        flight.idle_since, self._last_end = self._last_end, flight.end
        self._flights.append(flight)
        return flight

    def _apply(self, step: SchedulerOutput) -> None:
        """Take over what the step says of requests; their blocks are moved on the device, in the order of its work."""
        forget_requests(step, self._batch, self._sampler, self._proposals)
        self._proposals.move_blocks(step)
        for slot in add_requests(step, self._batch, self._sampler, self._proposals):
            self._buffers.add_request(slot, self._batch.token_ids(slot), self._batch.block_ids(slot))
        added = self._batch.update(step.cached_requests)
        for new in added:
            self._buffers.add_blocks(new.slot, new.first, self._batch.block_ids(new.slot)[new.first : new.end])
        self._proposals.add_blocks(added)

    def _run(
        self,
        flight: Flight,
        step: SchedulerOutput,
        shape: StepShape,
        prompt_sections: tuple[Section, Section] | None,
        begun: float,
    ) -> None:
        """Forward, sample, and fetch what was sampled."""
        query_len = 0 if prompt_sections is not None else self._recorded_query_len(shape)
        self._buffers.prepare(shape, query_len)
        prepared = time.perf_counter()
        logits = self._forward(flight, shape, prompt_sections, query_len)
        self._batch.finish_step(shape)
        forwarded = time.perf_counter()
        if logits is not None:
            self._sample(flight, step, shape, logits)
        output = flight.output
        output.prepare_seconds = prepared - begun
        output.forward_seconds = forwarded - prepared
        output.sample_seconds = time.perf_counter() - forwarded

    def _recorded_query_len(self, shape: StepShape) -> int:
        """Rows of each request in the recorded step to replay; 0 when there is none. A few tokens of a prompt are computed as decodes and
        drafts are."""
        if self._graphs is None:
            return 0
        query_len = self._graphs.query_len(len(shape.keys), int(shape.counts.max()))
        return query_len if shape.ends.min() >= query_len else 0

    def _forward(
        self, flight: Flight, shape: StepShape, prompt_sections: tuple[Section, Section] | None, query_len: int
    ) -> Tensor | None:
        """Logits of the rows that are sampled, [M, V]; None when there are none."""
        tensors, num_tokens = self._buffers.tensors, shape.num_tokens
        num_samples = len(shape.sampling) + int(shape.num_drafts.sum())
        if query_len and self._graphs is not None:
            logits = self._graphs.run(len(shape.keys), query_len)
            if not num_samples:
                return None
            return logits if num_samples == len(logits) else logits[tensors.logit_rows[:num_samples]]
        with forward_context(ForwardContext(self._buffers.metadata(shape), self._kv_caches)):
            hidden = self._model(tensors.input_ids[:num_tokens], tensors.positions[:num_tokens])
        if prompt_sections is not None:
            self._launch_prompt_logprobs(flight, hidden, *prompt_sections)
        if not num_samples:
            return None
        return self._model.compute_logits(
            hidden if num_samples == num_tokens else hidden[tensors.logit_rows[:num_samples]]
        )

    def _sample(self, flight: Flight, step: SchedulerOutput, shape: StepShape, logits: Tensor) -> None:
        tensors, count = self._buffers.tensors, len(logits)
        slots, masks = shape.slots[shape.sampling], step_masks(step, shape)
        rows = tensors.sample_slots[:count], tensors.sample_positions[:count]
        if count > len(slots):
            flight.drafts = verified_drafts(step, shape)
            sampled = self._sampler.launch_verify(logits, slots, *rows, flight.drafts, masks)
            slots = slots[shape.num_drafts[shape.sampling] == 0]
        else:
            sampled = self._sampler.launch(logits, slots, *rows, masks)
        flight.tokens = self._buffers.append(sampled.token_ids, sampled.failed)
        # Of the others the host does not know yet how many there are.
        self._batch.advance(slots)
        found = sampled.logprobs
        if found is not None:
            flight.logprob_rows, flight.num_top = found.rows, found.num_top
            flight.logprobs = self._fetch_logprobs(found.logprobs, found.ranks, found.top_ids, found.top_logprobs)

    def _pack_moves(self, step: SchedulerOutput) -> list[tuple[Callable[[Tensor], None], Section | Tensor]]:
        """What to do with which moves, in the order of the step."""
        mover = self._mover
        kinds = ((mover.swap_out, step.swap_outs), (mover.swap_in, step.swap_ins), (mover.copy, step.block_copies))
        return [(move, self._buffers.put_moves(moves)) for move, moves in kinds if moves]

    def _plan_prompt_logprobs(self, flight: Flight) -> tuple[Section, Section] | None:
        """Where the rows and the targets of the plan will be on the device."""
        if flight.shape is None:
            return None
        plan = flight.prompt_plan = plan_prompt_logprobs(self._batch, flight.shape)
        return None if plan is None else (self._buffers.put(plan.rows), self._buffers.put(plan.targets))

    def _launch_prompt_logprobs(self, flight: Flight, hidden: Tensor, rows: Section, targets: Section) -> None:
        """A few rows of logits at a time, as prompt_token_logprobs does."""
        if flight.prompt_plan is None:
            return
        num_top = flight.prompt_plan.num_top
        row_ids = self._buffers.view(rows).to(torch.int64)
        token_ids = self._buffers.view(targets).to(torch.int64)
        rows_at_once = max(1, self._max_logits_bytes // (4 * self._sampler.vocab_size))
        for start in range(0, len(num_top), rows_at_once):
            part = slice(start, start + rows_at_once)
            logits = self._model.compute_logits(hidden[row_ids[part]])
            most = min(max(num_top[part]), self._sampler.vocab_size)
            found = logprob_tensors(logits, token_ids[part], most)
            flight.prompt_logprobs.append(self._fetch_logprobs(*found))

    def _fetch(self, source: Tensor) -> Tensor:
        """Pinned memory that has what is in `source` now, when the step's end is reached."""
        target = self._accelerator.pinned(tuple(source.shape), source.dtype)
        self._accelerator.fetch(source, target)
        return target

    def _fetch_logprobs(
        self, logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor
    ) -> FetchedLogprobs:
        return FetchedLogprobs(*(self._fetch(tensor) for tensor in (logprobs, ranks, top_ids, top_logprobs)))

    # ---- back to the host ----

    def _finished(self, flight: Flight) -> RunnerOutput:
        output, shape = flight.output, flight.shape
        flight.add_times()
        flight.add_prompt_logprobs()
        if shape is not None and flight.tokens is not None:
            take_samples(flight, shape, flight.tokens.numpy(), self._batch, self._flights)
        if shape is not None and flight.dropped:
            drop_failed(output, flight, shape)
        if shape is not None and flight.num_proposals:
            self._propose(flight, shape)
        return output

    def _propose(self, flight: Flight, shape: StepShape) -> None:
        """Drafts for the requests that want some and were not taken out by a step that was launched meanwhile."""
        current = self._batch.incarnations[shape.slots] == flight.incarnations
        known = {shape.keys[row] for row in np.flatnonzero(current).tolist()}
        wanted = {key: count for key, count in flight.num_proposals.items() if key in known}
        with torch.inference_mode():
            self._proposals.propose(wanted, flight.output)
        if self._last_end is flight.end:
            # What proposing took of the device's time was not idle.
            self._last_end = self._accelerator.mark()

    def _explained(self, error: Exception) -> Exception:
        """`error`, or an IntegrityError when nothing can run on the device any more."""
        if is_out_of_memory(error):
            recover_memory(error, self._accelerator)
        if isinstance(error, IntegrityError) or not self._accelerator.is_lost():
            return error
        lost = IntegrityError(f"the device is lost: {error}")
        lost.__cause__ = error
        return lost
