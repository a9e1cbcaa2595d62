"""Steps that run before anybody is served: they make everything be loaded, compiled and allocated, and show what that takes.

Their requests are made here, run through the same runner as all others, and are forgotten in the end. What they leave in KV blocks is
overwritten before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle

from penstock.core.config import EngineConfig
from penstock.core.types import SamplingParams
from penstock.engine.step import CachedRequest, NewRequest, SchedulerOutput

_SMALL_PREFILL = 8
# Asks for whatever takes time or memory to prepare: the nucleus, log-probabilities, and in a full step penalties too.
_SMALL_SAMPLING = SamplingParams(seed=0, top_p=0.9, logprobs=1)
_FULL_SAMPLING = SamplingParams(
    seed=0, top_p=0.9, top_k=50, presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1, logprobs=1
)
_PROMPT_SAMPLING = SamplingParams(seed=0, top_p=0.9, logprobs=1, prompt_logprobs=1)
# The ways through sampling that have kernels of their own.
_SAMPLINGS = (
    SamplingParams(seed=0, temperature=0.0),
    SamplingParams(seed=0),
    SamplingParams(seed=0, top_k=50),
    SamplingParams(seed=0, temperature=0.0, presence_penalty=0.1, repetition_penalty=1.1),
    SamplingParams(seed=0, frequency_penalty=0.1),
    _SMALL_SAMPLING,
    _FULL_SAMPLING,
)
# Numbers that kernels may be compiled for one by one: a one, a multiple of 16, and neither.
_DECODES = (1, 3, 16)
_PREFILLS = (64, 61)


def small_steps(config: EngineConfig, num_blocks: int) -> list[SchedulerOutput]:
    """One prefill and one decode of one request, within `num_blocks` blocks."""
    length = max(1, min(_SMALL_PREFILL, config.max_model_len - 1, num_blocks * config.block_size - 1))
    blocks = list(range(-(-(length + 1) // config.block_size)))
    new = replace(_request("warm-up/0", length, config, _SMALL_SAMPLING), block_ids=blocks)
    return [*_prefill_and_decode([new], config), SchedulerOutput(0, finished_keys=[new.key])]


def full_steps(config: EngineConfig) -> list[SchedulerOutput]:
    """The largest prefill, the token budget spread over as many requests as a step may have, and the largest decode.

    All tokens are in block 0, so that a cache of one block is enough: what a step takes does not depend on where its keys and values are.
    """
    num_requests = min(config.max_num_seqs, config.max_num_batched_tokens)
    each, rest = divmod(config.max_num_batched_tokens, num_requests)
    new = []
    for index in range(num_requests):
        length = max(1, min(each + (rest if index == 0 else 0), config.max_model_len - 1))
        # One of them wants to know about its prompt, which takes the same for few requests as for many.
        sampling = _FULL_SAMPLING if index else _PROMPT_SAMPLING
        new.append(_request(f"full/{index}", length, config, sampling))
    forget = SchedulerOutput(0, finished_keys=[request.key for request in new])
    return [*_prefill_and_decode(new, config), forget]


def varied_steps(config: EngineConfig) -> list[SchedulerOutput]:
    """Prefills of lengths that double, and prefills behind decodes, sampled in all ways in turn: kernels are compiled for ranges of lengths
    and for some numbers apart from others, and whoever is the first to need one would wait for it. All in block 0, as in `full_steps`."""
    samplings = cycle(_SAMPLINGS)
    steps, length = [], 16
    while length <= min(config.max_num_batched_tokens, config.max_model_len):
        for tokens in (length, length - 3):
            new = _request(f"length/{tokens}", tokens, config, next(samplings))
            steps += [
                SchedulerOutput(0, new_requests=[new], num_scheduled_tokens={new.key: tokens}),
                SchedulerOutput(0, finished_keys=[new.key]),
            ]
        length *= 2
    for num_decodes in _DECODES:
        for tokens in _PREFILLS:
            fits = num_decodes + tokens <= config.max_num_batched_tokens and tokens <= config.max_model_len
            if fits and num_decodes < config.max_num_seqs:
                steps += _mixed(num_decodes, tokens, config, next(samplings))
    return steps


def verification_steps(config: EngineConfig, num_drafts: int, num_requests: int) -> list[SchedulerOutput]:
    """Up to `num_requests` requests, as many as the token budget has room for, each of which verifies `num_drafts` drafts in one step. All
    in block 0, as in `full_steps`. Nothing where not even one fits."""
    num_tokens = 1 + num_drafts
    num_requests = min(num_requests, config.max_num_seqs, config.max_num_batched_tokens // num_tokens)
    if not num_drafts or num_requests < 1 or 1 + num_tokens > config.max_model_len:
        return []
    samplings = cycle((_SMALL_SAMPLING, _FULL_SAMPLING))
    blocks = [0] * -(-(2 + num_tokens) // config.block_size)
    new = [
        replace(_request(f"drafts/{index}", 1, config, next(samplings)), block_ids=blocks)
        for index in range(num_requests)
    ]
    keys = [request.key for request in new]
    verification = SchedulerOutput(
        0,
        cached_requests=[CachedRequest(key, [], 1) for key in keys],
        num_scheduled_tokens=dict.fromkeys(keys, num_tokens),
        draft_token_ids={key: [0] * num_drafts for key in keys},
    )
    prefill = SchedulerOutput(0, new_requests=new, num_scheduled_tokens=dict.fromkeys(keys, 1))
    return [prefill, verification, SchedulerOutput(0, finished_keys=keys)]


def proposal_steps(config: EngineConfig, num_drafts: int, num_blocks: int) -> list[SchedulerOutput]:
    """A short prompt behind which drafts are proposed, within `num_blocks` blocks; nothing where there is no room for that."""
    length = min(_SMALL_PREFILL, config.max_num_batched_tokens)
    end = length + 1 + num_drafts
    if not num_drafts or end > min(config.max_model_len, num_blocks * config.block_size):
        return []
    blocks = list(range(-(-end // config.block_size)))
    new = replace(_request("proposals/0", length, config, _SMALL_SAMPLING), block_ids=blocks)
    step = SchedulerOutput(
        0, new_requests=[new], num_scheduled_tokens={new.key: length}, num_proposals={new.key: num_drafts}
    )
    return [step, SchedulerOutput(0, finished_keys=[new.key])]


def _mixed(num_decodes: int, tokens: int, config: EngineConfig, sampling: SamplingParams) -> list[SchedulerOutput]:
    """A prefill behind decodes in one step, and what has to be before and after it."""
    decoding = [_request(f"decode/{index}", 1, config, sampling) for index in range(num_decodes)]
    *steps, step = _prefill_and_decode(decoding, config)
    new = _request("prefill/0", tokens, config, sampling)
    step.new_requests.append(new)
    step.num_scheduled_tokens[new.key] = tokens
    return [*steps, step, SchedulerOutput(0, finished_keys=[*(request.key for request in decoding), new.key])]


def _request(key: str, length: int, config: EngineConfig, sampling: SamplingParams) -> NewRequest:
    """A prompt of `length` tokens, all in block 0, with room for one token more."""
    return NewRequest(
        key=key,
        token_ids=[0] * length,
        num_prompt_tokens=length,
        num_computed_tokens=0,
        block_ids=[0] * -(-(length + 1) // config.block_size),
        sampling=sampling,
        seed=0,
        sample_index=0,
    )


def _prefill_and_decode(new: list[NewRequest], config: EngineConfig) -> list[SchedulerOutput]:
    """Requests, prefilled and decoded once where the context has room for it."""
    lengths: Mapping[str, int] = {request.key: len(request.token_ids) for request in new}
    steps = [SchedulerOutput(0, new_requests=new, num_scheduled_tokens=dict(lengths))]
    if config.max_model_len > max(lengths.values()):
        cached = [CachedRequest(key, [], length) for key, length in lengths.items()]
        steps.append(SchedulerOutput(0, cached_requests=cached, num_scheduled_tokens=dict.fromkeys(lengths, 1)))
    return steps
