"""What a benchmark asks: prompts of exact token counts, drawn from a seed.

Prompts are token ids, so that lengths are exact for any model and no tokenizer is needed. Every prompt is unique (a server's prefix
cache cannot flatter the result) except for the share that is common on purpose:

    | shared prefix: the first round(prefix_share * length) tokens | unique tokens |

The shared prefix depends on the seed and its group only, so a warm-up request drawn from the same workload puts it into the
server's cache. The same seed gives the same prompts: on a server that has seen them they are cached, so each run takes a seed of its own
unless told otherwise.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from penstock.core.errors import ConfigError

# Ids that exist in every vocabulary from 4,096 tokens on, above the special and byte tokens that most put first.
DEFAULT_TOKEN_RANGE = (300, 4000)

_VOCABULARY = (
    "river stone morning garden lantern window harbor meadow copper silver autumn winter quiet bright narrow gentle walked "
    "carried found opened followed between beyond before slowly often never always the a and but with from to of in"
)
WORDS = tuple(_VOCABULARY.split())


@dataclass(frozen=True, slots=True)
class Lengths:
    """A length per request, uniform over low..high inclusive; equal bounds fix it. Raises ConfigError below 1 or when inverted."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"A length must be at least 1, written N or LOW:HIGH, not {self.low}:{self.high}.")

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`128` or `64:256`. Raises ConfigError."""
        parts = text.split(":")
        if len(parts) > 2 or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"A length is written N or LOW:HIGH, not {text!r}.")
        return cls(int(parts[0]), int(parts[-1]))

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: prompt as token ids or text, and the number of tokens to generate. `prompt_tokens` is None for text."""

    index: int
    prompt: list[int] | str
    prompt_tokens: int | None
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A seeded source of requests. `prefix_groups` shared prefixes take turns. `text`: words instead of token ids; lengths
    then count words.

    Raises ConfigError for values that cannot be used."""

    input_lengths: Lengths
    output_lengths: Lengths
    seed: int
    prefix_share: float = 0.0
    prefix_groups: int = 1
    token_range: tuple[int, int] = DEFAULT_TOKEN_RANGE
    text: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_share <= 1:
            raise ConfigError(f"The shared part of a prompt must be between 0 and 1, not {self.prefix_share}.")
        if self.prefix_groups < 1:
            raise ConfigError("At least one shared prefix is needed.")
        if not 0 <= self.token_range[0] < self.token_range[1]:
            raise ConfigError(f"Token ids must be a range LOW:HIGH with LOW below HIGH, not {self.token_range}.")

    def requests(self, count: int, *, first: int = 0) -> list[BenchRequest]:
        """Requests number first … first + count - 1 of this workload; each depends on the seed and its number only."""
        prefixes = [
            self._tokens(self._rng("prefix", group), self.input_lengths.high) for group in range(self.prefix_groups)
        ]
        return [self._request(index, prefixes[index % self.prefix_groups]) for index in range(first, first + count)]

    def _request(self, index: int, prefix: list[int]) -> BenchRequest:
        rng = self._rng("request", index)
        length = self.input_lengths.draw(rng)
        shared = round(self.prefix_share * length)
        ids = prefix[:shared] + self._tokens(rng, length - shared)
        max_tokens = self.output_lengths.draw(rng)
        if self.text:
            return BenchRequest(index, " ".join(WORDS[token % len(WORDS)] for token in ids), None, max_tokens)
        return BenchRequest(index, ids, length, max_tokens)

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return rng.choices(range(*self.token_range), k=count)

    def _rng(self, purpose: str, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{purpose}/{number}")  # noqa: S311 - reproducible prompts, not secrets
