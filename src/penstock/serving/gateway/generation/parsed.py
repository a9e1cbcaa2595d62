"""From the bytes of a body to what it asks for; remembered, because clients that can be answered from the cache send the same bytes again.

Parsing is a pure function of the bytes and its results are immutable, so remembering it changes nothing but the time: on a cache
hit it would be a third of all work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import Prompt
from penstock.serving.gateway.body import decode_object
from penstock.serving.gateway.cache.response_cache import KeyMemo
from penstock.serving.gateway.generation.call import Body, Kind

MAX_BODIES = 512
# With what is made of it about five times as much.
MAX_BODY_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Body]):
    """A checked body and what it asks of an engine. `memo` holds its key of the response cache."""

    body: Body
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    memo: KeyMemo = field(default_factory=KeyMemo)

    @property
    def repeatable(self) -> bool:
        """Whether the same body asks for the same answer."""
        return self.sampling.greedy or self.body.seed is not None


class Parser(Generic[Body]):
    """Parses the bodies of one endpoint. Keeps the last MAX_BODIES small ones whose answers can be repeated."""

    def __init__(self, kind: Kind[Body]) -> None:
        self._kind = kind
        self._known: OrderedDict[bytes, Parsed[Body]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def parse(self, raw: bytes) -> Parsed[Body]:
        """Raises InvalidRequestError naming the field that is wrong."""
        known = self._known.get(raw)
        if known is not None:
            self._known.move_to_end(raw)
            return known
        body = self._kind.parse(decode_object(raw))
        parsed = Parsed(body, self._kind.prompts(body), self._kind.sampling(body))
        if len(raw) <= MAX_BODY_BYTES and parsed.repeatable:
            self._known[raw] = parsed
            if len(self._known) > MAX_BODIES:
                self._known.popitem(last=False)
        return parsed
