"""An executor without a model that checks what the scheduler promises.

It keeps a token id in every slot of every block instead of keys and values. Before a request samples, the fake reads the request's whole
context back through its block table and compares it with the request's tokens: a wrong block, copy, swap, prefix hit or position
shows as a FakeExecutorError in the step where it happens. The sampled token is a pure function of the context and the seed, so the right
answer of any request is known without any engine (`expected_tokens` in fake_model.py), whatever drafts are proposed: those that are
refused leave garbage in their slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.errors import IntegrityError
from penstock.core.types import ModelInfo, TokenLogprobs
from penstock.engine.executor import KVCapacity, SpeculationProfile, StepHandle
from penstock.engine.step import BlockMove, NewRequest, RunnerOutput, SchedulerOutput
from penstock.testing.fake_model import EOS_TOKEN_ID, Propose, next_token, oracle

_EMPTY = -1
_REFUSED = -2


class FakeExecutorError(IntegrityError):
    """The scheduler broke a promise."""


@dataclass(slots=True)
class _KnownRequest:
    """What a runner keeps of a request."""

    data: NewRequest
    token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int
    proposed: list[int] = field(default_factory=list)


class _Handle:
    def __init__(self, executor: FakeExecutor, step: SchedulerOutput) -> None:
        self._executor = executor
        self.step = step
        self.output: RunnerOutput | Exception | None = None

    def done(self) -> bool:
        return self.output is not None

    def result(self) -> RunnerOutput:
        self._executor.run_until(self)
        if isinstance(self.output, Exception):
            raise self.output
        assert self.output is not None
        return self.output


class FakeExecutor:
    """`max_inflight` steps are accepted before one is run. `fail_when(step)`: an exception for the step to raise, or None.

    `error_when(key)`: an error that one request alone ends with, or None. `propose` makes the drafts when there is `speculation`; two right
    ones and then wrong ones, unless told otherwise.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        num_host_blocks: int = 0,
        max_inflight: int = 1,
        vocab_size: int = 997,
        max_model_len: int = 256,
        micro_batches: int = 1,
        speculation: SpeculationProfile | None = None,
        propose: Propose | None = None,
        fail_when: Callable[[SchedulerOutput], Exception | None] = lambda step: None,
        error_when: Callable[[str], str | None] = lambda key: None,
    ) -> None:
        self.max_inflight = max_inflight
        self.micro_batches = micro_batches
        self.speculation = speculation
        self.propose = propose or oracle(2, vocab_size)
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.steps: list[SchedulerOutput] = []
        self._capacity = KVCapacity(num_blocks, block_size, bytes_per_block=1, num_host_blocks=num_host_blocks)
        self._device = [[_EMPTY] * block_size for _ in range(num_blocks)]
        self._host = [[_EMPTY] * block_size for _ in range(num_host_blocks)]
        self._known: dict[str, _KnownRequest] = {}
        self._broken: set[str] = set()
        self._last_void_step = -1
        self._queue: deque[_Handle] = deque()
        self._fail_when = fail_when
        self._error_when = error_when

    # ---- executor protocol ----

    def submit(self, step: SchedulerOutput) -> StepHandle:
        self._check(len(self._queue) < self.max_inflight, f"step {step.step_id} is one too many in flight")
        self._check(bool(step.num_scheduled_tokens), f"step {step.step_id} is empty")
        self._check_company(step)
        self.steps.append(step)
        handle = _Handle(self, step)
        self._queue.append(handle)
        return handle

    def kv_capacity(self) -> KVCapacity:
        return self._capacity

    def model_info(self) -> ModelInfo:
        return ModelInfo(
            architecture="fake",
            dtype="float32",
            device="cpu",
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=(EOS_TOKEN_ID,),
            num_parameters=0,
            weight_bytes=0,
            model_hash="fake",
            block_size=self._capacity.block_size,
            kv_cache_tokens=self._capacity.num_blocks * self._capacity.block_size,
        )

    def shutdown(self) -> None:
        self._known.clear()

    # ---- execution ----

    def run_until(self, handle: _Handle) -> None:
        """Execute queued steps in order until `handle` has its result."""
        while handle.output is None:
            current = self._queue.popleft()
            try:
                current.output = self._execute(current.step)
            except FakeExecutorError:
                raise
            except Exception as error:
                current.output = error

    def _execute(self, step: SchedulerOutput) -> RunnerOutput:
        self._apply(step)
        failure = self._fail_when(step)
        if failure is None and self._broken & step.num_scheduled_tokens.keys():
            failure = RuntimeError("a step before this one failed")
        if failure is not None:
            self._broken |= step.num_scheduled_tokens.keys()
            # What is in flight behind a failed step may copy what that step did not write; nobody looks at its results.
            self._last_void_step = self.steps[-1].step_id
            raise failure
        output = RunnerOutput(step.step_id)
        for key in step.num_scheduled_tokens:
            self._run(step, self._known[key], output)
        return output

    def _run(self, step: SchedulerOutput, request: _KnownRequest, output: RunnerOutput) -> None:
        key = request.data.key
        drafts = step.draft_token_ids.get(key, [])
        context = [*request.token_ids, *drafts]
        start = request.num_computed_tokens
        end = start + step.num_scheduled_tokens[key]
        self._check(start < end <= len(context), f"{key}: tokens {start}…{end} of {len(context)} scheduled")
        samples = end == len(context)
        self._check_drafts(step, request, start, samples=samples)
        for position in range(start, end):
            self._slot_write(request, position, context[position])
        if step.step_id > self._last_void_step:
            self._check_context(request, context[:end])
        error = self._error_when(key)
        if error is not None:
            output.errors[key] = error
            if samples:
                request.token_ids.append(EOS_TOKEN_ID)  # steps in flight may go on from it
            return
        self._prompt_logprobs(output, request, start, end)
        if samples:
            self._sample(output, request, drafts, step.token_masks.get(key))
            count = step.num_proposals.get(key, 0)
            request.proposed = self.propose(request.data, request.token_ids, count) if count else []
            if request.proposed:
                output.draft_token_ids[key] = list(request.proposed)

    def _sample(
        self, output: RunnerOutput, request: _KnownRequest, drafts: list[int], masks: list[bytes] | None
    ) -> None:
        data = request.data
        num_known = len(request.token_ids)
        sampled: list[int] = []
        for place in range(1 + len(drafts)):
            mask = None if masks is None else masks[place]
            sampled.append(next_token(request.token_ids, data.seed + data.sample_index, self.vocab_size, mask))
            request.token_ids.append(sampled[-1])
            if drafts[place : place + 1] != sampled[-1:]:
                break
        for position in range(num_known + len(sampled) - 1, num_known + len(drafts)):
            self._slot_write(request, position, _REFUSED)
        output.sampled_token_ids[data.key] = sampled
        if data.sampling.logprobs is not None:
            output.logprobs[data.key] = [TokenLogprobs(token_id, -1.0, 1) for token_id in sampled]

    def _prompt_logprobs(self, output: RunnerOutput, request: _KnownRequest, start: int, end: int) -> None:
        data = request.data
        if data.sampling.prompt_logprobs is None:
            return
        first = max(start + 1, data.prompt_logprobs_start)
        last = min(end + 1, data.num_prompt_tokens)
        if first < last:
            entries = [TokenLogprobs(request.token_ids[p], -float(p), 1) for p in range(first, last)]
            output.prompt_logprobs[data.key] = (first, entries)

    def _apply(self, step: SchedulerOutput) -> None:
        for key in [*step.finished_keys, *step.preempted_keys]:
            self._check(key in self._known, f"{key} is forgotten twice")
            del self._known[key]
            self._broken.discard(key)
        self._move(step.swap_outs, self._device, self._host)
        self._move(step.swap_ins, self._host, self._device)
        self._move(step.block_copies, self._device, self._device)
        for new in step.new_requests:
            self._check(new.key not in self._known, f"{new.key} is new twice")
            self._known[new.key] = _KnownRequest(new, list(new.token_ids), list(new.block_ids), new.num_computed_tokens)
        for cached in step.cached_requests:
            request = self._known.get(cached.key)
            if request is None:
                raise FakeExecutorError(f"{cached.key} is continued but was never new")
            request.block_ids.extend(cached.new_block_ids)
            request.num_computed_tokens = cached.num_computed_tokens

    def _slot_write(self, request: _KnownRequest, position: int, token_id: int) -> None:
        block, offset = divmod(position, self._capacity.block_size)
        self._check(block < len(request.block_ids), f"{request.data.key} has no block for position {position}")
        self._device[request.block_ids[block]][offset] = token_id

    def _check_context(self, request: _KnownRequest, expected: list[int]) -> None:
        size = self._capacity.block_size
        context = [self._device[request.block_ids[p // size]][p % size] for p in range(len(expected))]
        self._check(context == expected, f"{request.data.key}: blocks hold {context}, not {expected}")

    def _check_company(self, step: SchedulerOutput) -> None:
        """Who is in the step, and in which order, beside what is in flight."""
        kinds = [
            (count > 1) + (count > 1 and key not in step.draft_token_ids)
            for key, count in step.num_scheduled_tokens.items()
        ]
        self._check(kinds == sorted(kinds), f"step {step.step_id} is out of order: {step.num_scheduled_tokens}")
        for handle in self._queue:
            earlier = handle.step
            bound = {*earlier.draft_token_ids, *earlier.num_proposals, *earlier.token_masks}
            if self.micro_batches > 1:
                bound = set(earlier.num_scheduled_tokens)
            both = bound & step.num_scheduled_tokens.keys()
            self._check(not both, f"steps {earlier.step_id} and {step.step_id} have {both} at once")

    def _check_drafts(self, step: SchedulerOutput, request: _KnownRequest, start: int, *, samples: bool) -> None:
        """What is promised of drafts, masks and proposals (engine/step.py)."""
        key = request.data.key
        drafts, masks = step.draft_token_ids.get(key), step.token_masks.get(key)
        if drafts is not None:
            self._check(
                samples and start == len(request.token_ids) - 1 and step.num_scheduled_tokens[key] == 1 + len(drafts),
                f"{key}: {len(drafts)} drafts, but {step.num_scheduled_tokens[key]} tokens from {start} on",
            )
            wanted = request.data.sampling.max_tokens
            num_output = len(request.token_ids) - request.data.num_prompt_tokens
            useful = wanted is None or num_output + len(drafts) < wanted
            self._check(useful, f"{key}: {len(drafts)} drafts behind {num_output} of {wanted} tokens")
            proposed = request.proposed[: len(drafts)]
            self._check(bool(drafts) and drafts == proposed, f"{key}: {drafts} was never proposed: {proposed}")
        if masks is not None:
            self._check(
                samples and len(masks) == 1 + len(drafts or ()),
                f"{key}: {len(masks)} masks for {len(drafts or ())} drafts, sampling: {samples}",
            )
        count = step.num_proposals.get(key)
        if count is not None:
            most = 0 if self.speculation is None else self.speculation.max_draft_tokens
            self._check(
                samples and 0 < count <= most, f"{key}: {count} proposals of at most {most}, sampling: {samples}"
            )
            num_tokens = len(request.token_ids) + len(drafts or ()) + 1 + count
            room = len(request.block_ids) * self._capacity.block_size
            self._check(num_tokens <= room, f"{key}: proposals up to token {num_tokens} in blocks for {room}")

    @staticmethod
    def _move(moves: list[BlockMove], source: list[list[int]], target: list[list[int]]) -> None:
        for move in moves:
            target[move.target] = list(source[move.source])

    @staticmethod
    def _check(condition: bool, message: str) -> None:
        if not condition:
            raise FakeExecutorError(message)
