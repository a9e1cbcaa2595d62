"""Checks that need the model: everything about a request that its types cannot know."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import msgspec

from penstock.core.errors import ContextLengthError, InvalidRequestError
from penstock.core.types import ModelInfo, SamplingParams


def check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise InvalidRequestError naming the field `name` for the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{name} contains token id {token_id}; this model's ids are 0 to {vocab_size - 1}.", param=name
            )


def check_prompt(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequestError for an empty prompt or an id outside the vocabulary."""
    if not token_ids:
        raise InvalidRequestError("The prompt is empty; at least one token is needed.", param=param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        check_token_ids(param, token_ids, vocab_size)


def complete_sampling(
    sampling: SamplingParams,
    num_prompt_tokens: int,
    model: ModelInfo,
    *,
    has_tokenizer: bool,
    prompt_param: str = "prompt",
) -> SamplingParams:
    """Check against the model, and fill in what the client left open: a seed, and as many tokens as fit. `prompt_param`: the field
    that holds the prompt.

    Raises InvalidRequestError naming the field, ContextLengthError with both numbers.
    """
    check_token_ids("logit_bias", sampling.logit_bias, model.vocab_size)
    check_token_ids("stop_token_ids", sampling.stop_token_ids, model.vocab_size)
    check_token_ids("allowed_token_ids", sampling.allowed_token_ids or (), model.vocab_size)
    check_something_is_allowed(sampling, model)
    if sampling.stop and not has_tokenizer:
        raise InvalidRequestError(
            "stop strings need a tokenizer, and this model has none; use stop_token_ids.", param="stop"
        )
    return msgspec.structs.replace(
        sampling,
        seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
        max_tokens=fit_max_tokens(sampling.max_tokens, num_prompt_tokens, model, prompt_param),
    )


def check_something_is_allowed(sampling: SamplingParams, model: ModelInfo) -> None:
    """Raise InvalidRequestError when every allowed token would end the output, before min_tokens lets it end."""
    if sampling.allowed_token_ids is None or not sampling.min_tokens:
        return
    ending = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else model.eos_token_ids)}
    if ending.issuperset(sampling.allowed_token_ids):
        raise InvalidRequestError(
            f"allowed_token_ids has only tokens that end the output, but min_tokens asks for {sampling.min_tokens} before one.",
            param="allowed_token_ids",
        )


def fit_max_tokens(max_tokens: int | None, num_prompt_tokens: int, model: ModelInfo, prompt_param: str) -> int:
    """`max_tokens`, or what is left when it is None. Raises ContextLengthError when prompt and output do not fit."""
    room = model.max_request_tokens - num_prompt_tokens
    needed = 1 if max_tokens is None else max_tokens
    if needed <= room:
        return room if max_tokens is None else max_tokens
    if max_tokens is None:
        requested = f"{num_prompt_tokens} tokens in the prompt and room for at least one more"
    else:
        total = num_prompt_tokens + max_tokens
        requested = f"{total} tokens ({num_prompt_tokens} in the prompt and {max_tokens} as max_tokens)"
    raise ContextLengthError(
        f"This request needs {requested}, but the model's limit is {model.max_model_len} tokens "
        f"and the KV cache holds {model.kv_cache_tokens}.",
        param="max_tokens" if max_tokens is not None and room > 0 else prompt_param,
    )
