"""An executor without a model that checks what the scheduler promises.

It keeps a token id in every slot of every block instead of keys and values. Before a request samples, the fake reads the request's whole
context back through its block table and compares it with the request's tokens: a wrong block, copy, swap, prefix hit or position
shows as a FakeExecutorError in the step where it happens. The sampled token is a pure function of the context and the seed, so the right
answer of any request is known without any engine (`expected_tokens`).
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.errors import IntegrityError
from penstock.core.types import ModelInfo, SamplingParams, TokenLogprobs
from penstock.engine.executor import KVCapacity, SpeculationProfile, StepHandle
from penstock.engine.step import BlockMove, NewRequest, RunnerOutput, SchedulerOutput

EOS_TOKEN_ID = 0
_EMPTY = -1


class FakeExecutorError(IntegrityError):
    """The scheduler broke a promise."""


def next_token(token_ids: list[int], seed: int, vocab_size: int) -> int:
    """The fake model: a token that depends on every token before it, and on the seed."""
    digest = zlib.crc32(array("q", token_ids).tobytes(), seed & 0xFFFFFFFF)
    return digest % vocab_size


def expected_tokens(prompt: list[int], sampling: SamplingParams, vocab_size: int, index: int = 0) -> list[int]:
    """The output that any correct engine gives with the fake model."""
    output: list[int] = []
    seed = (sampling.seed or 0) + index
    stop = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS_TOKEN_ID})
    while sampling.max_tokens is None or len(output) < sampling.max_tokens:
        output.append(next_token([*prompt, *output], seed, vocab_size))
        if output[-1] in stop and len(output) > sampling.min_tokens:
            break
    return output


@dataclass(slots=True)
class _KnownRequest:
    """What a runner keeps of a request."""

    data: NewRequest
    token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int


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

    `error_when(key)`: an error that one request alone ends with, or None.
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
        fail_when: Callable[[SchedulerOutput], Exception | None] = lambda step: None,
        error_when: Callable[[str], str | None] = lambda key: None,
    ) -> None:
        self.max_inflight = max_inflight
        self.micro_batches = 1
        self.speculation: SpeculationProfile | None = None
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
        for key, num_tokens in step.num_scheduled_tokens.items():
            request = self._known[key]
            start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            self._check(
                num_tokens > 0 and end <= len(request.token_ids),
                f"{key}: tokens {start}…{end} of {len(request.token_ids)} scheduled",
            )
            for position in range(start, end):
                self._slot_write(request, position)
            if step.step_id > self._last_void_step:
                self._check_context(key, request, end)
            error = self._error_when(key)
            if error is not None:
                output.errors[key] = error
                if end == len(request.token_ids):
                    request.token_ids.append(EOS_TOKEN_ID)  # steps in flight may go on from it
                continue
            self._prompt_logprobs(output, request, start, end)
            if end == len(request.token_ids):
                self._sample(output, request)
        return output

    def _sample(self, output: RunnerOutput, request: _KnownRequest) -> None:
        data = request.data
        token_id = next_token(request.token_ids, data.seed + data.sample_index, self.vocab_size)
        request.token_ids.append(token_id)
        output.sampled_token_ids[data.key] = [token_id]
        if data.sampling.logprobs is not None:
            output.logprobs[data.key] = [TokenLogprobs(token_id, -1.0, 1)]

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

    def _slot_write(self, request: _KnownRequest, position: int) -> None:
        block, offset = divmod(position, self._capacity.block_size)
        self._check(block < len(request.block_ids), f"{request.data.key} has no block for position {position}")
        self._device[request.block_ids[block]][offset] = request.token_ids[position]

    def _check_context(self, key: str, request: _KnownRequest, end: int) -> None:
        size = self._capacity.block_size
        context = [self._device[request.block_ids[p // size]][p % size] for p in range(end)]
        self._check(context == request.token_ids[:end], f"{key}: blocks hold {context}, not {request.token_ids[:end]}")

    @staticmethod
    def _move(moves: list[BlockMove], source: list[list[int]], target: list[list[int]]) -> None:
        for move in moves:
            target[move.target] = list(source[move.source])

    @staticmethod
    def _check(condition: bool, message: str) -> None:
        if not condition:
            raise FakeExecutorError(message)
