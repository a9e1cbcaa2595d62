"""The model of the fake executor: a pure function, so that the right answer of any request is known, and guesses of any quality too."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable

from penstock.core.types import SamplingParams
from penstock.engine.grammar import Matcher
from penstock.engine.step import NewRequest
from penstock.testing.pattern_matcher import allowed_tokens

EOS_TOKEN_ID = 0

# (the request as it came, its tokens so far, the most drafts that are wanted) → drafts
Propose = Callable[[NewRequest, list[int], int], list[int]]


def next_token(token_ids: list[int], seed: int, vocab_size: int, mask: bytes | None = None) -> int:
    """The fake model: a token that depends on every token before it, on the seed, and on which tokens are allowed."""
    digest = zlib.crc32(array("q", token_ids).tobytes(), seed & 0xFFFFFFFF)
    if mask is None:
        return digest % vocab_size
    allowed = allowed_tokens(mask)
    return allowed[digest % len(allowed)]


def expected_tokens(
    prompt: list[int], sampling: SamplingParams, vocab_size: int, index: int = 0, matcher: Matcher | None = None
) -> list[int]:
    """The output that any correct engine gives with the fake model; `matcher` is used up."""
    output: list[int] = []
    seed = (sampling.seed or 0) + index
    stop = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS_TOKEN_ID})
    while sampling.max_tokens is None or len(output) < sampling.max_tokens:
        mask = None if matcher is None else matcher.mask()
        output.append(next_token([*prompt, *output], seed, vocab_size, mask))
        if output[-1] in stop and len(output) > sampling.min_tokens:
            break
        if matcher is not None and not (matcher.accept(output[-1]) and not matcher.is_finished):
            break
    return output


def oracle(num_right: int, vocab_size: int, matcher_for: Callable[[str], Matcher | None] = lambda key: None) -> Propose:
    """Proposes as many drafts as are wanted, of which the first `num_right` are what will be sampled and the next one is not.
    `matcher_for(key)`: a fresh matcher of a request with a grammar."""

    def propose(request: NewRequest, token_ids: list[int], count: int) -> list[int]:
        matcher = matcher_for(request.key)
        if matcher is not None:
            all(map(matcher.accept, token_ids[request.num_prompt_tokens :]))
        known = list(token_ids)
        for place in range(count):
            if matcher is not None and matcher.is_finished:
                break
            mask = None if matcher is None else matcher.mask()
            token_id = next_token(known, request.seed + request.sample_index, vocab_size, mask)
            if matcher is not None:
                matcher.accept(token_id)
            known.append((token_id + 1) % vocab_size if place == num_right else token_id)
        return known[len(token_ids) :]

    return propose
