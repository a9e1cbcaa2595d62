"""One sample's output: its log of token ids, its text, where a stop string cuts it, its log-probabilities in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.types import FinishReason, SamplingParams, TokenLogprobs
from penstock.serving.frontend.client import TokenLogprob, TopLogprob
from penstock.serving.frontend.detokenizer import make_detokenizer
from penstock.serving.frontend.stop_strings import StopChecker, StopMatch
from penstock.serving.frontend.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SampleNews:
    """What a sample's new tokens amount to. `cut` means that a stop string ended the sample here, so the engine has to be told."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cut: bool = False


class SampleOutput:
    """The delta log of one sample (`token_ids`: everything that was reported) and what turns it into text.

    Stop strings count from the token number `min_tokens` on. The text of the token that ended the sample (EOS, stop_token_ids) is left
    out unless include_stop_str_in_output is set.
    """

    def __init__(
        self, index: int, sampling: SamplingParams, tokenizer: Tokenizer | None, *, at_text_start: bool
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._detokenizer = make_detokenizer(
            tokenizer, skip_special_tokens=sampling.skip_special_tokens, at_text_start=at_text_start
        )
        self._stops = StopChecker(sampling.stop, include=sampling.include_stop_str_in_output)

    def add(
        self,
        token_ids: list[int],
        logprobs: Sequence[TokenLogprobs] | None,
        finish_reason: FinishReason | None,
        stop_token_id: int | None,
    ) -> SampleNews:
        """Append new tokens. Nothing may be added after a finish reason, the returned one included."""
        silent = self._silent_tail(token_ids, finish_reason, stop_token_id)
        texts: list[str] = []
        match: StopMatch | None = None
        taken = token_ids
        if self._sampling.stop:
            match, count = self._feed_until_stop(token_ids[: len(token_ids) - silent], texts)
            taken = token_ids if match is None else token_ids[:count]
        else:
            texts.append(self._detokenizer.feed(token_ids[: len(token_ids) - silent]))
        self.token_ids += taken
        if match is None and finish_reason is not None:
            match = self._flush(texts)
        stop_reason: str | int | None = stop_token_id
        if match is not None:
            cut = finish_reason is None
            texts.append(match.text)
            finish_reason, stop_reason = "stop", match.stop
        else:
            cut = False
        self.finish_reason = finish_reason
        wanted = None if logprobs is None or self._sampling.logprobs is None else logprobs[: len(taken)]
        return SampleNews(
            text="".join(texts),
            token_ids=taken,
            logprobs=None if wanted is None else [spell_logprobs(entry, self._tokenizer) for entry in wanted],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            cut=cut,
        )

    def _silent_tail(self, token_ids: list[int], finish: FinishReason | None, stop_token_id: int | None) -> int:
        """How many tokens at the end have no text because they only say stop: 1 or 0."""
        ended_by_token = finish == "stop" and token_ids and token_ids[-1] == stop_token_id
        return int(bool(ended_by_token) and not self._sampling.include_stop_str_in_output)

    def _feed_until_stop(self, token_ids: list[int], texts: list[str]) -> tuple[StopMatch | None, int]:
        """Feed token by token; the match and the number of tokens up to it."""
        unchecked = self._sampling.min_tokens - len(self.token_ids) - 1
        for position, token_id in enumerate(token_ids):
            text = self._detokenizer.feed((token_id,))
            if position < unchecked:
                texts.append(text)
                continue
            result = self._stops.feed(text)
            if isinstance(result, StopMatch):
                return result, position + 1
            texts.append(result)
        return None, len(token_ids)

    def _flush(self, texts: list[str]) -> StopMatch | None:
        """Everything held back, at the end of the output."""
        result = self._stops.feed(self._detokenizer.finish())
        if isinstance(result, StopMatch):
            return result
        texts += (result, self._stops.finish())
        return None


def spell_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprob:
    """An engine's log-probabilities with the tokens' texts."""
    text, data = spell_token(entry.token_id, tokenizer)
    top = tuple(TopLogprob(token_id, *spell_token(token_id, tokenizer), logprob) for token_id, logprob in entry.top)
    return TokenLogprob(entry.token_id, text, data, entry.logprob, top)


def spell_prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], prompt_token_ids: Sequence[int], tokenizer: Tokenizer | None
) -> list[TokenLogprob]:
    """The same for a prompt, whose first token has no log-probability."""
    spelled = []
    for token_id, entry in zip(prompt_token_ids, entries, strict=True):
        if entry is None:
            spelled.append(TokenLogprob(token_id, *spell_token(token_id, tokenizer), None))
        else:
            spelled.append(spell_logprobs(entry, tokenizer))
    return spelled


def spell_token(token_id: int, tokenizer: Tokenizer | None) -> tuple[str, bytes]:
    """Text and bytes of a token; without a tokenizer its number stands for it."""
    if tokenizer is None:
        return f"token_id:{token_id}", b""
    data = tokenizer.token_bytes[token_id]
    return data.decode("utf-8", "replace"), data
