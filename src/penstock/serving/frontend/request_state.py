"""One request in flight: what was asked, the log of what came, and how the engine is asked to go on from there."""

from __future__ import annotations

import asyncio

import msgspec

from penstock.core.errors import EngineDeadError, EngineError, RequestError, error_from_info
from penstock.core.types import EngineRequest, SampleStart, SamplingParams, TokenDelta
from penstock.serving.frontend.client import ChatPrompt, Delta, GenerationRequest, TokenLogprob
from penstock.serving.frontend.mailbox import Mailbox
from penstock.serving.frontend.output_processor import SampleOutput, spell_prompt_logprobs
from penstock.serving.frontend.tokenizer import Tokenizer


class RequestState:
    """The delta log: prompt ids, per sample the output ids so far, seed. Enough to continue the request on any equal engine.

    `attempt` counts submissions from 0 (-1: not yet submitted) and is on every delta, so that late ones of an earlier submission are known.
    `crashes` counts the engines that died while they had this request. `in_engine`: the engine of now has it. `started`: a delta came at
    some time. `deadline` is the event loop's time.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        deadline: float | None,
    ) -> None:
        self.request = request
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.deadline = deadline
        self.attempt = -1
        self.crashes = 0
        self.in_engine = False
        self.started = False
        self.mailbox = Mailbox()
        self.timer: asyncio.TimerHandle | None = None
        at_text_start = isinstance(request.prompt, ChatPrompt)
        self.samples = [
            SampleOutput(index, sampling, tokenizer, at_text_start=at_text_start) for index in range(sampling.n)
        ]
        self._tokenizer = tokenizer
        self._num_cached_tokens: int | None = None
        self._prompt_reported = False
        self._prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def finished(self) -> bool:
        """All samples have ended."""
        return all(sample.finish_reason is not None for sample in self.samples)

    def next_submission(self, now: float) -> EngineRequest:
        """The message that starts the request, or continues it from the log, as the next attempt."""
        self.attempt += 1
        self.in_engine = True
        sampling = self.sampling
        if self._prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return EngineRequest(
            request_id=self.request_id,
            attempt=self.attempt,
            prompt_token_ids=self.prompt_token_ids,
            sampling=sampling,
            samples=[
                SampleStart(sample.index, list(sample.token_ids))
                for sample in self.samples
                if sample.finish_reason is None
            ],
            priority=self.request.priority,
            tenant=self.request.tenant,
            weight=self.request.weight,
            cache_salt=self.request.cache_salt,
            timeout_s=None if self.deadline is None else max(self.deadline - now, 0.001),
            # Whoever has seen output is not told after a crash that the queue is too long.
            queue_timeout_s=None if self.started else self.request.queue_timeout_s,
        )

    def accept(self, delta: TokenDelta) -> bool:
        """Take in news from the engine and put them into the mailbox. True when a stop string ended the sample, so that the engine has to
        stop it. Late deltas are dropped, repeated tokens trimmed. Raises the RequestError that ends the request."""
        if delta.attempt != self.attempt or not 0 <= delta.index < len(self.samples):
            return False
        sample = self.samples[delta.index]
        if sample.finish_reason is not None:
            return False
        self.started = True
        raise_failure(delta)
        repeated = len(sample.token_ids) - delta.offset
        if repeated < 0:
            raise EngineError("The engine skipped tokens of this request.", code="engine_gap")
        offset = len(sample.token_ids)
        logprobs = delta.logprobs[repeated:] if delta.logprobs is not None else None
        news = sample.add(delta.token_ids[repeated:], logprobs, delta.finish_reason, delta.stop_token_id)
        if self._num_cached_tokens is None:
            self._num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = spell_prompt_logprobs(delta.prompt_logprobs, self.prompt_token_ids, self._tokenizer)
        report_prompt = delta.index == 0 and not self._prompt_reported
        self._prompt_reported = self._prompt_reported or report_prompt
        self.mailbox.put(
            Delta(
                index=delta.index,
                text=news.text,
                token_ids=news.token_ids,
                offset=offset,
                num_output_tokens=offset + len(news.token_ids),
                num_prompt_tokens=len(self.prompt_token_ids),
                num_cached_tokens=self._num_cached_tokens,
                logprobs=news.logprobs,
                prompt_token_ids=self.prompt_token_ids if report_prompt else None,
                prompt_logprobs=self._prompt_logprobs if report_prompt else None,
                finish_reason=news.finish_reason,
                stop_reason=news.stop_reason,
                queue_time_s=delta.queue_time_s,
            )
        )
        return news.cut

    def close(self, error: RequestError | None = None) -> None:
        """The outcome."""
        self.in_engine = False
        if self.timer is not None:
            self.timer.cancel()
        self.mailbox.close(error)


def raise_failure(delta: TokenDelta) -> None:
    """Raise what a failed sample reports."""
    if delta.error is not None:
        raise error_from_info(delta.error)
    if delta.finish_reason == "error":
        raise EngineError("The engine failed on this request.")
    if delta.finish_reason == "abort":
        raise EngineDeadError("The engine ended this request before it was done; retry.", code="engine_aborted")
