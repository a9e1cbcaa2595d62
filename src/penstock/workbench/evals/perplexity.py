"""Perplexity of a text under a model, measured through the engine, so that what is judged is what would be served.

perplexity = exp(mean of -log p(token | tokens before it))      over all scored tokens
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from penstock.core.errors import ConfigError
from penstock.workbench.evals.scoring import Scorer, score_windows, standard_error
from penstock.workbench.evals.texts import Window

# Windows whose results are in memory at once.
_BATCH = 64


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of `tokens` scored tokens in `windows` windows.

    nll_per_token: mean negative log-likelihood in nats. standard_error: of the perplexity. Tokens of one window depend on each other, so it
    comes from the spread between windows, or between tokens when there is only one window. seconds: the engine's, without loading.
    tokens_per_second: tokens that went through the model, context included.
    """

    tokens: int
    windows: int
    nll_per_token: float
    perplexity: float
    standard_error: float
    seconds: float
    tokens_per_second: float


def measure_perplexity(llm: Scorer, windows: Sequence[Window], *, progress: bool = False) -> Perplexity:
    """Score all windows. Raises ConfigError when there is nothing to score; a request's own error when one fails."""
    losses: list[list[float]] = []
    started = time.perf_counter()
    with tqdm(total=len(windows), unit="window", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(windows), _BATCH):
            batch = windows[start : start + _BATCH]
            losses += [
                [-position.logprob for position in positions if position.logprob is not None]
                for positions in score_windows(llm, batch)
            ]
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    tokens = sum(map(len, losses))
    if not tokens:
        raise ConfigError("The text has fewer than two tokens; give a longer one with --text.")
    mean = math.fsum(loss for window in losses for loss in window) / tokens
    perplexity = math.exp(mean)
    units = losses if len(losses) > 1 else [[loss] for loss in losses[0]]
    return Perplexity(
        tokens=tokens,
        windows=len(losses),
        nll_per_token=mean,
        perplexity=perplexity,
        # The delta method: d exp(x) = exp(x) dx.
        standard_error=perplexity * standard_error([(math.fsum(unit), len(unit)) for unit in units], mean),
        seconds=seconds,
        tokens_per_second=sum(len(window.token_ids) for window in windows) / seconds,
    )
