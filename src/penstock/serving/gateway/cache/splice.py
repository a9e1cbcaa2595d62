"""Joins a generation that was begun anew to what its readers already have.

    delivered   t0 t1 t2 t3
    again       t0 t1 | t2 t3 t4 | t5 …       compared up to t3, then passed on from t4: no token doubled, none lost

What holds for tokens holds for text. Where the second generation says something else, the request ends with `generation_diverged`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from penstock.core.errors import EngineError
from penstock.serving.frontend.client import Delta


@dataclass(slots=True)
class _Choice:
    """`token_ids` and `texts` have been delivered. `seen` counts the tokens of the present source. While that repeats what has been
    delivered, `delivered_text` is what it has to say and `text` what it has said."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ended: bool = False
    repeats: bool = False
    seen: int = 0
    delivered_text: str = ""
    text: str = ""


class Splice:
    """The news of one flight, from one source after the other; each begins at the start."""

    def __init__(self) -> None:
        self._choices: dict[tuple[int, int], _Choice] = {}

    def restart(self) -> None:
        """From now on another source speaks."""
        for choice in self._choices.values():
            choice.repeats = True
            choice.seen = 0
            choice.text = ""
            choice.delivered_text = "".join(choice.texts)

    def new_part(self, prompt: int, delta: Delta) -> Delta | None:
        """What this delta adds to what has been delivered; None if nothing. Raises EngineError."""
        choice = self._choices.get((prompt, delta.index))
        if choice is None:
            choice = self._choices[prompt, delta.index] = _Choice()
        if delta.offset != choice.seen:
            raise _diverged()
        rest: Delta | None = delta
        if choice.repeats:
            rest = self._compare(choice, delta)
        choice.seen += len(delta.token_ids)
        if rest is not None:
            choice.token_ids += rest.token_ids
            choice.texts.append(rest.text)
            choice.ended = rest.finish_reason is not None
        return rest

    def _compare(self, choice: _Choice, delta: Delta) -> Delta | None:
        known = choice.token_ids[choice.seen : choice.seen + len(delta.token_ids)]
        choice.text += delta.text
        common = min(len(choice.text), len(choice.delivered_text))
        left = len(choice.token_ids) - choice.seen - len(known)
        ends_elsewhere = delta.finish_reason is not None and left > 0
        goes_on = choice.ended and len(delta.token_ids) > len(known)
        if (
            delta.token_ids[: len(known)] != known
            or choice.text[:common] != choice.delivered_text[:common]
            or ends_elsewhere
            or goes_on
        ):
            raise _diverged()
        if choice.ended or left > 0:
            return None
        rest = choice.text[len(choice.delivered_text) :]
        if len(choice.text) >= len(choice.delivered_text):
            choice.repeats = False
        if not rest and len(known) == len(delta.token_ids) and delta.finish_reason is None:
            return None
        return replace(
            delta,
            text=rest,
            token_ids=delta.token_ids[len(known) :],
            offset=delta.offset + len(known),
            logprobs=None if delta.logprobs is None else delta.logprobs[len(known) :],
            prompt_token_ids=None,
            prompt_logprobs=None,
            queue_time_s=None,
        )


def _diverged() -> EngineError:
    return EngineError(
        "The generation was continued elsewhere and came out differently. Please try again.", code="generation_diverged"
    )
