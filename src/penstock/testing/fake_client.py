"""An EngineClient without an engine: deterministic text at a chosen speed, and every way of failing on request.

Tokens are the bytes of UTF-8 (ids 0–255); 256 is the start token, 257 ends a text. A reply is the same text for the same prompt:

    prompt "abc", sample 0  →  reply "abc" repeated without end, or what `Behavior.reply` says

so that streams, stop strings, usage and log-probabilities can be predicted by a test.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import (
    AbortedError,
    ContextLengthError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
)
from penstock.core.types import EngineStats, FinishReason, LiveLimits, ModelInfo
from penstock.serving.frontend.client import (
    ChatPrompt,
    Delta,
    GenerationRequest,
    Health,
    Prompt,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
    TopLogprob,
)

BOS = 256
EOS = 257
VOCABULARY = 258
_CEILING = LiveLimits(max_num_batched_tokens=512, max_num_seqs=64, max_prefill_tokens_while_decoding=128)


@dataclass
class Behavior:
    """How the next requests go. Times in seconds.

    `reply`: the whole text of every sample, ended by EOS (None: the prompt again and again). `error` is raised after
    `error_after` tokens; `hang_after` tokens the request stops without an end. `num_cached_tokens` is reported as is.
    """

    first_delay_s: float = 0.0
    interval_s: float = 0.0
    tokens_per_delta: int = 1
    reply: str | None = None
    error: BaseException | None = None
    error_after: int = 0
    hang_after: int | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass
class _Sample:
    """One sample, worked out ahead: its tokens, and how it ends."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None


@dataclass
class FakeClient:
    """Implements EngineClient. `requests` holds what was asked, `closed_early` the ids whose reader left before the end."""

    behavior: Behavior = field(default_factory=Behavior)
    max_model_len: int = 4096
    health_now: Health = field(default_factory=lambda: Health(live=True, ready=True))
    requests: list[GenerationRequest] = field(default_factory=list)
    closed_early: list[str] = field(default_factory=list)
    active: dict[str, asyncio.Event] = field(default_factory=dict)
    limits: LiveLimits = _CEILING
    draining: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Yield the deltas of all samples, round robin."""
        self.requests.append(request)
        if self.draining:
            raise OverloadedError("The server is shutting down.", retry_after_s=1)
        if not self.health_now.ready:
            raise EngineDeadError("The engine is not available.")
        behavior = dataclasses.replace(self.behavior)
        prompt_ids = await self.tokenize(request.prompt)
        needed = len(prompt_ids) + (request.sampling.max_tokens or 0)
        if needed > self.max_model_len:
            raise ContextLengthError(f"The request needs {needed} tokens; the model takes {self.max_model_len}.")
        aborted = self.active[request.request_id] = asyncio.Event()
        finished = False
        try:
            async with asyncio.timeout(request.timeout_s):
                async for delta in self._deltas(request, prompt_ids, behavior, aborted):
                    yield delta
            finished = True
        except TimeoutError:
            finished = True
            raise DeadlineExceededError("The request took too long.") from None
        except RequestError:
            finished = True
            raise
        finally:
            del self.active[request.request_id]
            if not self.active:
                self._idle.set()
            if not finished:
                self.closed_early.append(request.request_id)

    async def _deltas(
        self, request: GenerationRequest, prompt_ids: list[int], behavior: Behavior, aborted: asyncio.Event
    ) -> AsyncIterator[Delta]:
        await _pause(behavior.first_delay_s, aborted)
        samples = [_work_out(request, prompt_ids, behavior, index) for index in range(request.sampling.n)]
        streams = [_sample_deltas(request, prompt_ids, behavior, sample) for sample in samples]
        sent = 0
        while streams:
            for stream in streams[:]:
                if behavior.error is not None and sent >= behavior.error_after:
                    raise behavior.error
                if behavior.hang_after is not None and sent >= behavior.hang_after:
                    await _pause(3600, aborted)
                delta = next(stream)
                if delta.finish_reason is not None:
                    streams.remove(stream)
                yield delta
                sent += len(delta.token_ids)
            await _pause(behavior.interval_s, aborted)

    async def abort(self, request_id: str) -> None:
        """End the request with AbortedError."""
        if request_id in self.active:
            self.active[request_id].set()

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Bytes of the prompt; a text prompt starts with BOS unless told otherwise."""
        match prompt:
            case TextPrompt(text, add_special_tokens):
                return [BOS] * add_special_tokens + list(text.encode())
            case TokensPrompt(token_ids):
                for token in token_ids:
                    if not 0 <= token < VOCABULARY:
                        raise InvalidRequestError(f"Token id {token} is outside the vocabulary.", param="prompt")
                return list(token_ids)
            case ChatPrompt(messages, add_generation_prompt):
                text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
                return [BOS, *(text + "<assistant>" * add_generation_prompt).encode()]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        return _text(await self.tokenize(TokensPrompt(token_ids)))

    async def model_info(self) -> ModelInfo:
        """A small model that exists only here."""
        if not self.health_now.live:
            raise EngineDeadError("The engine is not available.")
        return ModelInfo(
            architecture="fake",
            dtype="float32",
            device="cpu",
            vocab_size=VOCABULARY,
            max_model_len=self.max_model_len,
            eos_token_ids=(EOS,),
            num_parameters=0,
            weight_bytes=0,
            model_hash="fake",
            kv_cache_tokens=65536,
        )

    async def configure(self, limits: LiveLimits) -> LiveLimits:
        """Change limits below the ceiling."""
        new: dict[str, int] = {}
        for name in limits.__struct_fields__:
            value, ceiling = getattr(limits, name), getattr(_CEILING, name)
            if value is not None and not 1 <= value <= ceiling:
                raise InvalidRequestError(f"{name} must be between 1 and {ceiling}, not {value}.", param=name)
            new[name] = getattr(self.limits, name) if value is None else value
        self.limits = LiveLimits(**new)
        return self.limits

    async def stats(self) -> EngineStats | None:
        """Numbers that a test can look for."""
        return EngineStats(
            uptime_s=12.5,
            steps=7,
            running=len(self.active),
            waiting=0,
            kv_blocks_total=100,
            kv_blocks_used=25,
            kv_blocks_cached=5,
            finished={"stop": 3},
            limits=self.limits,
        )

    def health(self) -> Health:
        """What `health_now` says."""
        return self.health_now

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, abort the rest."""
        self.draining = True
        if self.active:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        for request_id in list(self.active):
            await self.abort(request_id)


async def _pause(seconds: float, aborted: asyncio.Event) -> None:
    if seconds > 0:
        try:
            await asyncio.wait_for(aborted.wait(), seconds)
        except TimeoutError:
            return
    else:
        await asyncio.sleep(0)
    if aborted.is_set():
        raise AbortedError("The request was aborted.")


def _work_out(request: GenerationRequest, prompt_ids: list[int], behavior: Behavior, index: int) -> _Sample:
    """The tokens of a sample, cut by max_tokens, stop_token_ids and stop strings, whichever comes first."""
    sampling = request.sampling
    most = 16 if sampling.max_tokens is None else sampling.max_tokens
    if behavior.reply is not None:
        endless = [*behavior.reply.encode(), EOS]
    else:
        body = [token for token in prompt_ids if token < BOS] or [ord("x")]
        endless = [*body] * (most // len(body) + 1)
    tokens = endless[:most]
    for position, token in enumerate(tokens):
        if token == EOS or token in sampling.stop_token_ids:
            return _Sample(
                index, tokens[: position + 1], _text(tokens[:position]), "stop", None if token == EOS else token
            )
        text = _text(tokens[: position + 1]) if sampling.stop else ""
        for stop in sampling.stop:
            at = text.find(stop)
            if at >= 0:
                end = at + len(stop) if sampling.include_stop_str_in_output else at
                return _Sample(index, tokens[: position + 1], text[:end], "stop", stop)
    return _Sample(index, tokens, _text(tokens), "length")


def _sample_deltas(
    request: GenerationRequest, prompt_ids: list[int], behavior: Behavior, sample: _Sample
) -> Iterator[Delta]:
    """The deltas of one sample; text is held back until it is whole UTF-8 and no part of a stop string."""
    sampling = request.sampling
    size = max(1, behavior.tokens_per_delta)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sent = decoded = 0
    for start in range(0, max(1, len(sample.token_ids)), size):
        tokens = sample.token_ids[start : start + size]
        last = start + size >= len(sample.token_ids)
        decoded += len(decoder.decode(bytes(token for token in tokens if token < BOS)))
        upto = len(sample.text) if last else min(decoded, len(sample.text))
        first = start == 0 and sample.index == 0
        yield Delta(
            index=sample.index,
            text=sample.text[sent:upto],
            token_ids=tokens,
            offset=start,
            num_output_tokens=start + len(tokens),
            num_prompt_tokens=len(prompt_ids),
            num_cached_tokens=behavior.num_cached_tokens,
            logprobs=None if sampling.logprobs is None else [_logprob(token, sampling.logprobs) for token in tokens],
            prompt_token_ids=prompt_ids if first else None,
            prompt_logprobs=_prompt_logprobs(prompt_ids, sampling.prompt_logprobs) if first else None,
            finish_reason=(behavior.finish_reason or sample.finish_reason) if last else None,
            stop_reason=sample.stop_reason if last else None,
            queue_time_s=0.001 if start == 0 else None,
        )
        sent = upto


def _prompt_logprobs(prompt_ids: list[int], top: int | None) -> list[TokenLogprob] | None:
    if top is None:
        return None
    first = dataclasses.replace(_logprob(prompt_ids[0], top), logprob=None, top=())
    return [first, *(_logprob(token, top) for token in prompt_ids[1:])]


def _logprob(token: int, top: int) -> TokenLogprob:
    """Token t has the log-probability -(t % 8 + 1) / 8; its alternatives are the ids after it, ever less likely."""
    value = -(token % 8 + 1) / 8
    others = tuple((token + step) % VOCABULARY for step in range(top))
    alternatives = tuple(
        TopLogprob(other, token_text(other), token_bytes(other), value - 0.25 * step)
        for step, other in enumerate(others)
    )
    return TokenLogprob(token, token_text(token), token_bytes(token), value, alternatives)


def token_bytes(token: int) -> bytes:
    """The bytes that a token stands for."""
    return {BOS: b"<s>", EOS: b"</s>"}[token] if token >= BOS else bytes([token])


def token_text(token: int) -> str:
    """The token as text; the replacement character where its bytes are not whole."""
    return token_bytes(token).decode(errors="replace")


def _text(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < BOS).decode(errors="replace")
