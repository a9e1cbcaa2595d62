"""The engine: requests in, token deltas out, one step at a time. The same object runs in its own process, in `LLM` and in tests."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import psutil

from penstock.core.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineError,
    ErrorInfo,
    IntegrityError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
)
from penstock.core.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    LiveLimits,
    ModelInfo,
    SampleStart,
    TokenDelta,
)
from penstock.engine.deadlines import Deadlines
from penstock.engine.executor import Executor, StepHandle
from penstock.engine.grammar import Matcher
from penstock.engine.kv_cache_manager import KVCacheManager
from penstock.engine.plan import Update
from penstock.engine.policy import make_policy
from penstock.engine.prefix_cache import root_hash
from penstock.engine.request import Request
from penstock.engine.scheduler import Scheduler
from penstock.engine.speculation import SpeculationController
from penstock.engine.stats import Counters
from penstock.engine.step import SchedulerOutput
from penstock.engine.verification import SpeculationCounts

logger = logging.getLogger(__name__)

# An executor that fails this often without a good step between is broken, not unlucky.
MAX_CONSECUTIVE_FAILURES = 16
# A tenant may fill so many times the room in the queue that it leaves to others.
QUEUE_GREED = 7

Client = bytes
Addressed = tuple[Client, TokenDelta]


class _Submitted(NamedTuple):
    """A step in flight, when it was submitted, and whether there had been requests all the time since the step before it."""

    scheduled: SchedulerOutput
    handle: StepHandle
    started: float
    was_busy: bool


class Engine:
    """Owns the scheduler and drives an executor.

    `ceiling` fixes the live limits' upper bounds. `clock` is monotonic seconds. `matcher_for` makes what restricts a sample's output, a
    new one at each call, or None; a RequestError from it refuses the request. Every sample of every accepted or refused request ends with
    exactly one delta that has a `finish_reason`. Not thread-safe.
    """

    def __init__(
        self,
        executor: Executor,
        ceiling: LiveLimits,
        *,
        policy: str = "fair",
        prefix_caching: bool = True,
        max_waiting_requests: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        matcher_for: Callable[[EngineRequest], Matcher | None] | None = None,
    ) -> None:
        capacity = executor.kv_capacity()
        self._executor = executor
        self._clock = clock
        self._started = clock()
        self._ceiling = ceiling
        self._max_waiting_requests = max_waiting_requests
        self._prefix_caching = prefix_caching
        self.model: ModelInfo = executor.model_info()
        self._matcher_for = matcher_for
        self._speculation = None if executor.speculation is None else SpeculationController(executor.speculation)
        self.scheduler = Scheduler(
            KVCacheManager(capacity, prefix_caching=prefix_caching),
            make_policy(policy),
            ceiling,
            self._speculation,
            executor.micro_batches,
        )
        self.counters = Counters()
        self._order = 0
        self._submitted: deque[_Submitted] = deque()
        # There have been requests since the last step was submitted: if the device waits for the next, it waits for us.
        self._was_busy = False
        self._requests: dict[tuple[Client, str], dict[int, Request]] = {}
        self._deadlines: Deadlines[Request] = Deadlines()
        self._queue_deadlines: Deadlines[tuple[Client, str]] = Deadlines()
        self._consecutive_failures = 0
        self._last_retired = self._started
        self._process = psutil.Process()

    # ---- requests ----

    def add(self, source: EngineRequest, client: Client = b"") -> list[Addressed]:
        """Accept a request, or refuse it: then the returned deltas are its outcome."""
        try:
            self._check(source, client)
            matchers = [self._matcher(source, sample) for sample in _samples(source)]
        except RequestError as error:
            return self.refuse(source, error.info, client)
        now = self._clock()
        room = self.model.max_request_tokens - len(source.prompt_token_ids)
        max_tokens = source.sampling.max_tokens
        root = root_hash(self.model.model_hash, source.tenant, source.cache_salt)
        requests = []
        for sample, matcher in zip(_samples(source), matchers, strict=True):
            request = Request(
                source,
                sample,
                client=client,
                order=self._order,
                now=now,
                eos_token_ids=self.model.eos_token_ids,
                max_output_tokens=room if max_tokens is None else min(max_tokens, room),
                root_hash=root,
                matcher=matcher,
            )
            self._order += 1
            requests.append(request)
        self._requests[client, source.request_id] = {request.index: request for request in requests}
        fresh = [request for request in requests if request.num_output_tokens == 0]
        for follower in fresh[1:]:
            follower.leader = fresh[0]
        self._was_busy = self._was_busy and bool(self.scheduler.requests)
        for request in requests:
            self.scheduler.add(request)
            if request.deadline is not None:
                self._deadlines.set(request, request.deadline)
        if source.queue_timeout_s is not None:
            self._queue_deadlines.set((client, source.request_id), now + source.queue_timeout_s)
        self.counters.prompt_tokens += len(source.prompt_token_ids)
        return []

    def refuse(self, source: EngineRequest, error: ErrorInfo, client: Client = b"") -> list[Addressed]:
        """The outcome of a request that is not accepted."""
        return [(client, _refusal(source, sample, error)) for sample in _samples(source)]

    def _check(self, source: EngineRequest, client: Client) -> None:
        """Raise a RequestError for what would not run. Frontends check too; the engine must not depend on it."""
        prompt = source.prompt_token_ids
        if (client, source.request_id) in self._requests:
            raise InvalidRequestError("A request with this id is running.", param="request_id")
        if not prompt:
            raise InvalidRequestError("The prompt has no tokens.", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            raise InvalidRequestError(
                f"The prompt has token ids outside 0 … {self.model.vocab_size - 1}.", param="prompt"
            )
        wanted = 1 if source.sampling.max_tokens is None else source.sampling.max_tokens
        if len(prompt) + wanted > self.model.max_request_tokens:
            raise ContextLengthError(
                f"{len(prompt)} prompt tokens and {wanted} output tokens do not fit: the model takes "
                f"{self.model.max_model_len} tokens and the KV cache holds {self.model.kv_cache_tokens}."
            )
        room_to_wait = self._max_waiting_requests - self.scheduler.num_waiting
        if room_to_wait <= 0:
            raise OverloadedError(f"{self._max_waiting_requests} requests are waiting already; retry later.")
        if source.tenant and self.scheduler.policy.num_waiting_of(source.tenant) >= QUEUE_GREED * room_to_wait:
            raise OverloadedError("Too many of your requests are waiting already; retry later.")

    def _matcher(self, source: EngineRequest, sample: SampleStart) -> Matcher | None:
        """What restricts the output of this sample, with the output it already has taken in."""
        matcher = None if self._matcher_for is None else self._matcher_for(source)
        if matcher is not None and (not all(map(matcher.accept, sample.output_token_ids)) or matcher.is_finished):
            raise InvalidRequestError("The request's grammar does not allow the output to go on from.", param="samples")
        return matcher

    def abort(
        self, client: Client, request_id: str, indices: list[int] | None = None, error: ErrorInfo | None = None
    ) -> list[Addressed]:
        """End a request's unfinished samples (or those of `indices`); with `error` they fail, else they end as aborted."""
        requests = self._requests.get((client, request_id), {})
        deltas = []
        for index, request in list(requests.items()):
            if indices is None or index in indices:
                self.scheduler.finish(request)
                reason: FinishReason = "abort" if error is None else "error"
                deltas.append(self._delta(Update(request, request.num_output_tokens, [], finish_reason=reason), error))
        return deltas

    def abort_client(self, client: Client) -> None:
        """Forget a client that is gone, with all its requests."""
        for owner, request_id in list(self._requests):
            if owner == client:
                self.abort(client, request_id)

    def expire(self) -> list[Addressed]:
        """End the requests whose deadline has passed, and those that waited too long for their first step."""
        now = self._clock()
        deltas = []
        for request in self._deadlines.take_passed(now):
            late = DeadlineExceededError("The request did not finish before its deadline.")
            deltas += self.abort(request.client, request.request_id, [request.index], late.info)
        for client, request_id in self._queue_deadlines.take_passed(now):
            samples = self._requests.get((client, request_id), {})
            # A request has begun with the first of its samples; the others wait for a place, but no longer for an answer.
            if all(sample.last_step_id < 0 for sample in samples.values()):
                waited = OverloadedError("The request waited too long for its turn; retry later.")
                deltas += self.abort(client, request_id, None, waited.info)
        return deltas

    # ---- steps ----

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> list[Addressed]:
        """Submit as many steps as may be in flight, wait for the oldest, and return its news."""
        phases = self.counters.phase_seconds
        while len(self._submitted) < self._executor.max_inflight:
            begun = self._clock()
            scheduled = self.scheduler.schedule()
            submitted = self._clock()
            phases["schedule"] += submitted - begun
            if scheduled is None:
                break
            handle = self._executor.submit(scheduled)
            self._submitted.append(_Submitted(scheduled, handle, submitted, self._was_busy))
            self._was_busy = True
        if not self._submitted:
            return []
        scheduled, handle, started, was_busy = self._submitted.popleft()
        try:
            output = handle.result()
        except IntegrityError:
            raise
        except Exception as error:
            return self._step_failed(scheduled, error)
        self._consecutive_failures = 0
        retired = self._clock()
        phases["prepare"] += output.prepare_seconds
        phases["forward"] += output.forward_seconds
        phases["sample"] += output.sample_seconds
        phases["draft"] += output.draft_seconds
        self.counters.device_seconds += output.device_seconds
        if was_busy:
            self.counters.device_idle_seconds += output.device_idle_seconds
        # Before the update, which forgets the requests that end.
        self._count_step(scheduled, retired, retired - started)
        # Scheduling and delivery are part of what tokens cost.
        begun = self._last_retired if was_busy else started
        self._measure_step(scheduled, retired - begun, output.draft_seconds)
        self._last_retired = retired
        updates = self.scheduler.update(output)
        deltas = [self._delta(update) for update in updates]
        phases["deliver"] += self._clock() - retired
        return deltas

    def _step_failed(self, scheduled: SchedulerOutput, error: Exception) -> list[Addressed]:
        logger.exception("step %d with %d requests failed", scheduled.step_id, len(scheduled.num_scheduled_tokens))
        self._last_retired = self._clock()
        self.counters.step_failures += 1
        self._consecutive_failures += 1
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            raise IntegrityError(f"{self._consecutive_failures} steps in a row failed") from error
        return [self._delta(update) for update in self.scheduler.fail(scheduled.step_id, str(error))]

    def _count_step(self, scheduled: SchedulerOutput, now: float, seconds: float) -> None:
        counters = self.counters
        counters.steps += 1
        counters.step_seconds.observe(seconds)
        counters.step_tokens.observe(scheduled.total_tokens)
        counters.swapped_out_blocks += len(scheduled.swap_outs)
        counters.swapped_in_blocks += len(scheduled.swap_ins)
        for new in scheduled.new_requests:
            request = self.scheduler.requests.get(new.key)
            if request is not None and request.first_scheduled_time is None:
                request.first_scheduled_time = now - seconds
                self._queue_deadlines.drop((request.client, request.request_id))
            if self._prefix_caching:
                counters.prefix_queried_tokens += len(new.token_ids)
                counters.prefix_hit_tokens += new.num_computed_tokens

    def _measure_step(self, scheduled: SchedulerOutput, seconds: float, draft_seconds: float) -> None:
        """Tell who chooses draft lengths what a step cost: the time since the one before it, if there were requests all that time."""
        if self._speculation is None:
            return
        num_requests = len(scheduled.num_scheduled_tokens)
        num_drafts = sum(map(len, scheduled.draft_token_ids.values()))
        num_prompt_tokens = scheduled.total_tokens - num_requests - num_drafts
        self._speculation.step_done(num_requests, num_prompt_tokens, seconds, draft_seconds)

    def _delta(self, update: Update, error: ErrorInfo | None = None) -> Addressed:
        request = update.request
        first = update.offset == 0 and (update.token_ids or update.finish_reason is not None)
        if update.finish_reason is not None:
            self._forget(request, update.finish_reason)
        if update.error is not None:
            logger.error("request %s failed in the runner: %s", request.key, update.error)
            error = EngineError("The model could not compute this request.").info
        self.counters.generation_tokens += len(update.token_ids)
        prompt_logprobs = None
        if first and request.prompt_logprobs is not None and not request.needs_prompt_logprobs:
            prompt_logprobs = [None, *request.prompt_logprobs]
        queue_time = None
        if first and request.first_scheduled_time is not None:
            queue_time = request.first_scheduled_time - request.arrival_time
        return request.client, TokenDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            index=request.index,
            offset=update.offset,
            token_ids=update.token_ids,
            logprobs=update.logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=request.num_cached_tokens,
            finish_reason=update.finish_reason,
            stop_token_id=update.stop_token_id,
            error=error,
            queue_time_s=queue_time,
        )

    def _forget(self, request: Request, reason: str) -> None:
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        self._deadlines.drop(request)
        samples = self._requests[request.client, request.request_id]
        del samples[request.index]
        if not samples:
            del self._requests[request.client, request.request_id]
            self._queue_deadlines.drop((request.client, request.request_id))

    # ---- settings and state ----

    def configure(self, limits: LiveLimits) -> LiveLimits:
        """Change live limits from the next step on. Raises InvalidRequestError below 1 or above the start-up value."""
        current = self.scheduler.limits
        values: dict[str, int | None] = {}
        for name in LiveLimits.__struct_fields__:
            value, ceiling = getattr(limits, name), getattr(self._ceiling, name)
            if value is not None and not 1 <= value <= ceiling:
                raise InvalidRequestError(
                    f"{name} must be between 1 and its start-up value {ceiling}, not {value}.", param=name
                )
            values[name] = getattr(current, name) if value is None else value
        self.scheduler.limits = LiveLimits(
            max_num_batched_tokens=values["max_num_batched_tokens"],
            max_num_seqs=values["max_num_seqs"],
            max_prefill_tokens_while_decoding=values["max_prefill_tokens_while_decoding"],
        )
        return self.scheduler.limits

    def stats(self) -> EngineStats:
        """A snapshot for the frontends and /metrics."""
        kv, counters = self.scheduler.kv, self.counters
        verified = SpeculationCounts() if self.scheduler.verification is None else self.scheduler.verification.counts
        return EngineStats(
            uptime_s=self._clock() - self._started,
            steps=counters.steps,
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            kv_blocks_total=kv.pool.num_blocks,
            kv_blocks_used=kv.pool.num_blocks - kv.pool.num_free,
            kv_blocks_cached=kv.pool.num_cached,
            host_blocks_total=kv.host.num_blocks if kv.host else 0,
            host_blocks_used=kv.host.num_used if kv.host else 0,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_queried_tokens=counters.prefix_queried_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            preemptions=self.scheduler.num_preemptions,
            swapped_out_blocks=counters.swapped_out_blocks,
            swapped_in_blocks=counters.swapped_in_blocks,
            step_failures=counters.step_failures,
            finished=dict(counters.finished),
            step_seconds_sum=counters.step_seconds.sum,
            step_seconds_buckets=list(counters.step_seconds.counts),
            step_tokens_sum=int(counters.step_tokens.sum),
            step_tokens_buckets=list(counters.step_tokens.counts),
            step_phase_seconds=dict(counters.phase_seconds),
            device_seconds=counters.device_seconds,
            device_idle_seconds=counters.device_idle_seconds,
            draft_tokens=verified.draft_tokens,
            accepted_draft_tokens=verified.accepted_draft_tokens,
            verifications=verified.verifications,
            limits=self.scheduler.limits,
            resident_bytes=self._process.memory_info().rss,
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless blocks, queues and requests are consistent."""
        self.scheduler.check_integrity()
        known = {request.key for samples in self._requests.values() for request in samples.values()}
        if known != set(self.scheduler.requests):
            raise IntegrityError(f"{len(known)} requests are open, the scheduler has {len(self.scheduler.requests)}")

    def shutdown(self) -> None:
        self._executor.shutdown()


def _samples(source: EngineRequest) -> list[SampleStart]:
    return source.samples or [SampleStart(index) for index in range(source.sampling.n)]


def _refusal(source: EngineRequest, sample: SampleStart, error: ErrorInfo) -> TokenDelta:
    return TokenDelta(
        request_id=source.request_id,
        attempt=source.attempt,
        index=sample.index,
        offset=len(sample.output_token_ids),
        token_ids=[],
        finish_reason="error",
        error=error,
    )


def merge_deltas(earlier: TokenDelta, later: TokenDelta) -> TokenDelta:
    """One delta that says what two consecutive ones of the same sample say."""
    logprobs = None
    if earlier.logprobs is not None or later.logprobs is not None:
        logprobs = [*(earlier.logprobs or []), *(later.logprobs or [])]
    return msgspec.structs.replace(
        later,
        offset=earlier.offset,
        token_ids=[*earlier.token_ids, *later.token_ids],
        logprobs=logprobs,
        prompt_logprobs=earlier.prompt_logprobs or later.prompt_logprobs,
        queue_time_s=later.queue_time_s if earlier.queue_time_s is None else earlier.queue_time_s,
    )
