"""Which requests may be answered from the cache, shared with others in flight, and kept, and for how long.

    deterministic (temperature 0, or a seed of the client) or `cache: {"use": true}`     may be read, coalesced and kept
    Cache-Control: no-store, `cache: {"no_store": true}` or `{"use": false}`             none of it: bypass
    Cache-Control: no-cache or max-age=0, `cache: {"no_cache": true}`                    a new generation, which is kept
    Cache-Control: max-age=N                                                             answers older than N seconds do not count
    Cache-Control: only-if-cached                                                        504 instead of a generation
    `cache: {"ttl": N}`                                                                  what is kept lives N seconds, at most a day

Header and body add up. Directives that are unknown or malformed are ignored (RFC 9111, 5.2); a wrong body is a 400 that names the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from penstock.core.errors import RequestError
from penstock.core.types import ModelInfo, SamplingParams
from penstock.serving.gateway.schemas.sampling import CacheOptions

_SECONDS = re.compile('"?([0-9]{1,18})"?')


class NotCachedError(RequestError):
    """The client wanted a stored answer or none (RFC 9111, 5.2.1.7)."""

    status = 504
    type = "invalid_request_error"
    default_code = "not_cached"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the cache does for one request. `key` None: nothing. `may_read`: stored answers and generations in flight may be used.
    `ttl_s`: how long a new answer is kept. `seed`: what a sampled answer without a seed of the client is drawn with, so that
    any process can continue it; None: the request's own. `model`: what the key was made for."""

    key: str | None
    may_read: bool = False
    only_if_cached: bool = False
    max_age_s: float = math.inf
    ttl_s: float = 0.0
    seed: int | None = None
    model: ModelInfo | None = None

    def sampling(self, sampling: SamplingParams) -> SamplingParams:
        """What to generate with."""
        return sampling if self.seed is None else msgspec.structs.replace(sampling, seed=self.seed)


@dataclass(slots=True)
class Directives:
    """The request's Cache-Control."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age_s: float = math.inf


def parse_cache_control(headers: Iterable[tuple[bytes, bytes]]) -> Directives:
    """From ASGI's headers. Of several max-age the smallest holds."""
    found = Directives()
    for name, value in headers:
        if name != b"cache-control":
            continue
        for item in value.decode("latin-1").lower().split(","):
            directive, equals, argument = item.strip().partition("=")
            if directive == "max-age":
                seconds = _SECONDS.fullmatch(argument)
                if seconds is not None:
                    found.max_age_s = min(found.max_age_s, float(seconds[1]))
            elif equals:
                continue
            elif directive == "no-store":
                found.no_store = True
            elif directive == "no-cache":
                found.no_cache = True
            elif directive == "only-if-cached":
                found.only_if_cached = True
    return found


def make_plan(
    make_key: Callable[[], str],
    *,
    sampling: SamplingParams,
    client_seed: bool,
    headers: Iterable[tuple[bytes, bytes]],
    options: CacheOptions | None,
    default_ttl_s: float,
    model: ModelInfo | None = None,
) -> Plan:
    """`make_key` is called only when the key is needed."""
    wish = parse_cache_control(headers)
    options = options or CacheOptions()
    deterministic = sampling.greedy or client_seed
    if wish.no_store or options.no_store or not (deterministic if options.use is None else options.use):
        return Plan(None, only_if_cached=wish.only_if_cached)
    key = make_key()
    fresh = wish.no_cache or options.no_cache or wish.max_age_s == 0
    # Followers in other processes can only continue what they can draw again. A request for something new wants another draw.
    seed = int(key[:15], 16) if not deterministic and not fresh else None
    return Plan(
        key,
        may_read=not fresh,
        only_if_cached=wish.only_if_cached,
        max_age_s=wish.max_age_s,
        ttl_s=default_ttl_s if options.ttl is None else options.ttl,
        seed=seed,
        model=model,
    )
