"""How far one model's predictions are from another's on the same text: KL divergence and agreement on the best token.

The engine gives the most likely tokens of a position, not the whole distribution. What both models name is compared token by token, all
the rest as one event. Merging events can only lower a divergence (log-sum inequality), so the figure is a lower bound; with 20 tokens
it is a tight one, because little probability is left over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from penstock.core.errors import ConfigError
from penstock.core.types import MAX_TOP_LOGPROBS
from penstock.workbench.evals.scoring import Position, Scorer, score_windows, standard_error
from penstock.workbench.evals.texts import Window

# Windows whose results are in memory at once; a position has 20 alternatives.
_BATCH = 16

# A probability that rounding made zero or negative.
_TINY = 1e-9


@dataclass(frozen=True)
class Divergence:
    """Over `tokens` positions: the mean KL(reference || model) in nats (a lower bound), its standard error with windows as the independent
    units (NaN for one window), and the share of positions with the same best token."""

    tokens: int
    kl_divergence: float
    standard_error: float
    top1_agreement: float


def measure_divergence(
    reference: Scorer, model: Scorer, windows: Sequence[Window], *, progress: bool = False
) -> Divergence:
    """Compare two models with the same tokenizer. Raises ConfigError when there is nothing to score; a request's own error."""
    sums: list[tuple[float, int]] = []
    agreeing = 0
    with tqdm(total=len(windows), unit="window", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(windows), _BATCH):
            batch = windows[start : start + _BATCH]
            ours, theirs = (score_windows(llm, batch, MAX_TOP_LOGPROBS) for llm in (model, reference))
            for p_window, q_window in zip(theirs, ours, strict=True):
                pairs = list(zip(p_window, q_window, strict=True))
                sums.append((math.fsum(position_divergence(p, q) for p, q in pairs), len(pairs)))
                agreeing += sum(best_token(p) == best_token(q) for p, q in pairs)
            bar.update(len(batch))
    tokens = sum(count for _, count in sums)
    if not tokens:
        raise ConfigError("The text has fewer than two tokens; give a longer one with --text.")
    mean = math.fsum(total for total, _ in sums) / tokens
    return Divergence(tokens, mean, standard_error(sums, mean), agreeing / tokens)


def position_divergence(reference: Position, model: Position) -> float:
    """KL(reference || model) in nats over the tokens that both name, and one event for all others."""
    p, q = _named(reference), _named(model)
    both = p.keys() & q.keys()
    divergence = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    p_rest = max(1.0 - math.fsum(math.exp(p[token]) for token in both), _TINY)
    q_rest = max(1.0 - math.fsum(math.exp(q[token]) for token in both), _TINY)
    return max(divergence + p_rest * math.log(p_rest / q_rest), 0.0)


def best_token(position: Position) -> int:
    """The most likely token; of equally likely ones the lowest id."""
    return min(position.top, key=lambda alternative: (-alternative.logprob, alternative.token_id)).token_id


def _named(position: Position) -> dict[int, float]:
    """Log-probabilities of the alternatives and of the text's own token."""
    named = {alternative.token_id: alternative.logprob for alternative in position.top}
    if position.logprob is not None:
        named[position.token_id] = position.logprob
    return named
