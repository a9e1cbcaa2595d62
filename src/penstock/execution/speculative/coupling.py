"""Why drafts are verified by drawing the same numbers, and what that costs.

Randomness here is a pure function of (seed, sample index, position). At every position tokens race: token v comes in at E(v) / p(v), with
an exponential random number E(v) that belongs to the position and the token (sampling/draw.py), and the first one is the token.

    token                   a       b       c       d
    E                     0.36    1.90    0.62    0.05
    target p              0.20    0.30    0.48    0.02
    E / p                 1.80    6.33    1.29    2.50      the model's token is c, drafted or not
    draft q               0.24    0.25    0.50    0.01
    E / q                 1.50    7.60    1.24    5.00      the draft model, with the same E, proposes c: accepted

Verification draws each token from the model's own distribution with the numbers of its position, and a draft counts as accepted when it is
the token that was drawn. So the output is token for token that of plain decoding with the same seed, whatever is drafted, by whom, at
whatever load, and with any change of draft lengths in between; that it follows the model's distribution needs no further argument.

Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) accepts a draft x ~ q with probability
min(1, p(x) / q(x)) and draws from the positive part of p - q when it refuses. That is the maximal coupling: no rule accepts more often. But
its output, though of the same distribution, depends on what was drafted and so on load. Daliri et al. 2024, "Coupling without Communication
and Drafter-Invariant Speculative Decoding" (arXiv:2408.07978), study rules whose output does not, of which a race is near the best: it
refuses with probability at most 2 D / (1 + D) at the total variation D of p and q, where the maximal coupling refuses with D. The race here
has two stages, chunks of tokens and then the tokens of one, which refuses a little more often and needs fewer random numbers. For a draft
that is one token, not a distribution (n-gram, or temperature 0), all rules accept with probability p(token). The functions below say what
each rule accepts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.core.errors import IntegrityError
from penstock.execution.sampling.draw import CHUNK

FloatArray = npt.NDArray[np.float64]


def acceptance_of_one_hot(target: npt.ArrayLike, token_id: int) -> float:
    """Probability that a draft which is always `token_id` is accepted: the target's probability of it.

    target: probabilities [V]. Raises IntegrityError for what is not a distribution, here and below.
    """
    return float(_distribution(target)[token_id])


def acceptance_of_coupling(target: npt.ArrayLike, draft: npt.ArrayLike) -> float:
    """Probability that a draft drawn with the target's own random numbers is accepted: the sum over chunks of the probability that both
    races of chunks are won by it, times that of both races of its tokens being won by the same one.

    target, draft: probabilities [V] of the same vocabulary.
    """
    p, q = (_distribution(some) for some in _pair(target, draft))
    missing = -len(p) % CHUNK
    p_chunks, q_chunks = (np.pad(some, (0, missing)).reshape(-1, CHUNK) for some in (p, q))
    won = _won_by_both(p_chunks.sum(axis=1), q_chunks.sum(axis=1))
    possible = np.flatnonzero(won)
    return float(sum(won[chunk] * _won_by_both(p_chunks[chunk], q_chunks[chunk]).sum() for chunk in possible))


def acceptance_of_maximal_coupling(target: npt.ArrayLike, draft: npt.ArrayLike) -> float:
    """The most that any rule can accept: sum over tokens of min(p, q), which speculative sampling with resampling reaches.

    target, draft: probabilities [V] of the same vocabulary.
    """
    p, q = (_distribution(some) for some in _pair(target, draft))
    return float(np.minimum(p, q).sum())


def _pair(target: npt.ArrayLike, draft: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    p, q = np.asarray(target, dtype=np.float64), np.asarray(draft, dtype=np.float64)
    if p.shape != q.shape:
        raise IntegrityError(f"target {p.shape} and draft {q.shape} are of different vocabularies")
    return p, q


def _distribution(probabilities: npt.ArrayLike) -> FloatArray:
    values: FloatArray = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 1 or not (values >= 0).all() or abs(float(values.sum()) - 1.0) > 1e-6:
        raise IntegrityError("probabilities have to be a row of numbers that are not negative and sum to 1")
    return values


def _won_by_both(p: FloatArray, q: FloatArray) -> FloatArray:
    """For each entrant v, the probability that it wins two races with the same random numbers and weights p and q:
    1 / sum over w of max(p(w) / p(v), q(w) / q(v)) (Daliri et al. 2024)."""
    # For an entrant w behind v in the order of p / q the first quotient is the larger one, for one before it the second.
    p, q = p / p.sum(), q / q.sum()
    only_p, only_q = float(p[q == 0].sum()), float(q[p == 0].sum())
    result = np.zeros(len(p))
    possible = np.flatnonzero((p > 0) & (q > 0))
    order = possible[np.argsort(p[possible] / q[possible])]
    p, q = p[order], q[order]
    behind = np.cumsum(p[::-1])[::-1] + only_p
    before = np.cumsum(q) - q + only_q
    result[order] = 1.0 / (behind / p + before / q)
    return result
