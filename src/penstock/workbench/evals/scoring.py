"""Log-probabilities of given texts from an engine in this process: what every evaluation here begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.core.types import SamplingParams
from penstock.workbench.evals.texts import Window


class Alternative(Protocol):
    """A likely token at some position."""

    @property
    def token_id(self) -> int: ...

    @property
    def logprob(self) -> float: ...


class Position(Protocol):
    """A token of the text, its log-probability (None for the first token), and the most likely tokens at its place."""

    @property
    def token_id(self) -> int: ...

    @property
    def logprob(self) -> float | None: ...

    @property
    def top(self) -> Sequence[Alternative]: ...


class ScoredPrompt(Protocol):
    """The result of one prompt."""

    @property
    def prompt_logprobs(self) -> Sequence[Position] | None: ...

    @property
    def error(self) -> Exception | None: ...


class Scorer(Protocol):
    """What is needed of `penstock.LLM`."""

    def generate(
        self, prompts: Sequence[str | list[int]], sampling_params: SamplingParams
    ) -> Sequence[ScoredPrompt]: ...


def score_windows(llm: Scorer, windows: Sequence[Window], alternatives: int = 0) -> list[Sequence[Position]]:
    """Per window, its scored positions with the `alternatives` most likely tokens of each. Raises a request's own error."""
    sampling = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=alternatives)
    scored = []
    for window, result in zip(windows, llm.generate([window.token_ids for window in windows], sampling), strict=True):
        if result.error is not None:
            raise result.error
        if result.prompt_logprobs is None:
            raise ValueError("the engine gave no log-probabilities of the prompt")
        scored.append(result.prompt_logprobs[window.first_scored :])
    return scored


def standard_error(sums: Sequence[tuple[float, int]], mean: float) -> float:
    """Of a mean over tokens, from (sum, count) of independent units of tokens (ratio estimator); NaN for fewer than two units."""
    if len(sums) < 2:
        return float("nan")
    spread = sum((total - count * mean) ** 2 for total, count in sums) * len(sums) / (len(sums) - 1)
    return float(spread**0.5) / sum(count for _, count in sums)
