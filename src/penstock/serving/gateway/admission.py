"""Whether a generation is let into an engine: by requests and tokens in flight, and by nothing else. All ordering is the engine's.

A refusal costs a few comparisons, so that it can be given in microseconds however busy the engine is. The engine's own queue is bounded
too; the caps here are what keeps prompts, sockets and readers of a flood out of memory.

One tenant alone cannot fill the caps: it may hold at most GREED times of what is still free (the dynamic thresholds of Choudhury and
Hahne for shared buffers, 1998). Alone it gets seven eighths; two such tenants seven fifteenths each; whoever comes next
finds room.

    │ tenant a: held ≤ 7 × free                                       │ free │
    │ tenant a: held ≤ 7 × free    │ tenant b: held ≤ 7 × free    │ free      │
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.errors import OverloadedError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import ModelInfo
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

# Of an engine that does not say how many requests it runs at once.
DEFAULT_REQUESTS = 256
# In flight for each request that runs and each token of KV cache: a full batch and enough that waits for its turn.
OVERCOMMIT = 4
GREED = 7
MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0
_COMPLETIONS_KEPT = 128
_MAX_MODELS = 512


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that may be in flight in one engine. `tokens`: prompt and output tokens reserved; None: not bounded."""

    requests: int
    tokens: int | None


def capacity_of(model: ModelInfo | None, config: GatewayConfig, worker_share: float = 1.0) -> Capacity:
    """What a gateway process with `worker_share` of an engine may have in flight in it. Settings of 0 follow the engine's size; one
    that does not state it (zeros, or None before its first start) gets DEFAULT_REQUESTS and no bound on tokens."""
    max_num_seqs, kv_cache_tokens = (0, 0) if model is None else (model.max_num_seqs, model.kv_cache_tokens)
    requests = config.max_inflight_requests or OVERCOMMIT * max_num_seqs or DEFAULT_REQUESTS
    tokens = config.max_inflight_tokens or OVERCOMMIT * kv_cache_tokens
    return Capacity(_part(requests, worker_share), _part(tokens, worker_share) if tokens else None)


def _part(whole: int, share: float) -> int:
    # A third of 3 must be 1 whatever floats make of it.
    return max(1, int(whole * share + 1e-6))


class AdmissionSlot:
    """A request's place among those in flight, until `leave`."""

    __slots__ = ("_admission", "_load", "_tenant", "_tokens")

    def __init__(self, admission: Admission, load: _Load, tenant: str, tokens: int) -> None:
        self._admission: Admission | None = admission
        self._load = load
        self._tenant = tenant
        self._tokens = tokens

    def leave(self) -> None:
        """Give the place back, once; further calls do nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.release(self._load, self._tenant, self._tokens)


class Admission:
    """Counts what is in flight per model. `worker_share`: this process's part of each engine, 1 / N with N gateway processes. Used from
    one event loop; `clock` is monotonic seconds.

    `model` is always the name of a served model, never a client's word. State per tenant exists while the tenant has something in flight.
    """

    def __init__(
        self,
        config: GatewayConfig,
        recorder: Recorder,
        *,
        worker_share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._worker_share = worker_share
        self._clock = clock
        self._loads: dict[str, _Load] = {}

    def enter(self, model: str, tokens: int, info: ModelInfo | None, *, tenant: str = "") -> AdmissionSlot:
        """Take a place for a request that reserves `tokens`. Raises OverloadedError with a Retry-After when there is none.

        `info`: the engine's, None while it starts for the first time. A request above the bound on tokens is let in when nothing else
        runs. `tenant` "": the only one there is, not held to a share.
        """
        load = self._loads.get(model) or self._new_load(model)
        load.limits = capacity_of(info, self._config, self._worker_share)
        reason = load.refusal_reason(tokens, tenant)
        if reason is not None:
            raise self._refuse(load, reason)
        if not load.busy:
            load.measure_from(self._clock())
        load.requests += 1
        load.tokens += tokens
        if tenant:
            load.tenant_requests[tenant] += 1
            load.tenant_tokens[tenant] += tokens
        self._recorder.set(metrics.INFLIGHT_TOKENS, load.tokens, model)
        return AdmissionSlot(self, load, tenant, tokens)

    def overloaded(self, model: str) -> bool:
        """Whether every request to `model` would be refused now, whatever it asks. False before the first request."""
        load = self._loads.get(model)
        return load is not None and load.full

    def refuse(self, model: str) -> OverloadedError:
        """The answer for a request that is turned away because `overloaded` said so; counted like other refusals."""
        load = self._loads.get(model) or self._new_load(model)
        return self._refuse(load, "tokens" if load.requests < load.limits.requests else "requests")

    def in_flight(self, model: str) -> int:
        """Requests that have a place now."""
        load = self._loads.get(model)
        return 0 if load is None else load.requests

    def release(self, load: _Load, tenant: str, tokens: int) -> None:
        """A slot's way to leave; use AdmissionSlot.leave."""
        load.requests -= 1
        load.tokens -= tokens
        load.completions.append(self._clock())
        if tenant:
            load.tenant_tokens[tenant] -= tokens
            load.tenant_requests[tenant] -= 1
            if load.tenant_requests[tenant] == 0:
                del load.tenant_requests[tenant], load.tenant_tokens[tenant]
        self._recorder.set(metrics.INFLIGHT_TOKENS, load.tokens, load.model)

    def _refuse(self, load: _Load, reason: str) -> OverloadedError:
        self._recorder.increment(metrics.REFUSED, reason)
        retry_after_s = load.retry_after_s(self._clock())
        who = "Your share of the server is in use" if reason == "tenant" else "The server is at capacity"
        return OverloadedError(f"{who}; retry in about {retry_after_s:.0f} s.", retry_after_s=retry_after_s)

    def _new_load(self, model: str) -> _Load:
        if len(self._loads) >= _MAX_MODELS:
            self._loads = {name: load for name, load in self._loads.items() if load.requests}
        return self._loads.setdefault(model, _Load(model, self._clock()))


class _Load:
    """What is in flight in one engine, and when its last requests ended, since it became busy."""

    __slots__ = ("completions", "limits", "model", "requests", "since", "tenant_requests", "tenant_tokens", "tokens")

    def __init__(self, model: str, now: float) -> None:
        self.model = model
        self.since = now
        self.limits = Capacity(DEFAULT_REQUESTS, None)
        self.requests = 0
        self.tokens = 0
        self.tenant_requests: Counter[str] = Counter()
        self.tenant_tokens: Counter[str] = Counter()
        self.completions: deque[float] = deque(maxlen=_COMPLETIONS_KEPT)

    @property
    def full(self) -> bool:
        """Not even a request for one token has room."""
        limits = self.limits
        return self.requests >= limits.requests or (limits.tokens is not None and self.tokens >= limits.tokens)

    @property
    def busy(self) -> bool:
        """Half of what may be in flight is: requests now end as fast as the engine can, not as seldom as they come."""
        limits = self.limits
        return 2 * self.requests >= limits.requests or (limits.tokens is not None and 2 * self.tokens >= limits.tokens)

    def measure_from(self, now: float) -> None:
        """The rate at which requests end counts from now on."""
        self.since = now
        self.completions.clear()

    def refusal_reason(self, tokens: int, tenant: str) -> str | None:
        limits = self.limits
        if self.requests >= limits.requests:
            return "requests"
        if self.requests and limits.tokens is not None and self.tokens + tokens > limits.tokens:
            return "tokens"
        if tenant and self.tenant_requests[tenant] and self._beyond_share(tokens, tenant):
            return "tenant"
        return None

    def _beyond_share(self, tokens: int, tenant: str) -> bool:
        limits = self.limits
        if self.tenant_requests[tenant] >= GREED * (limits.requests - self.requests):
            return True
        if limits.tokens is None:
            return False
        return self.tenant_tokens[tenant] + tokens > GREED * (limits.tokens - self.tokens - tokens)

    def retry_after_s(self, now: float) -> float:
        """The time in which half of what is in flight will have ended at the present rate: then there is room, and the engine does not
        run dry before clients come back. While nothing has ended: as long again as that has taken."""
        ended = len(self.completions)
        start = self.completions[0] if ended == _COMPLETIONS_KEPT else self.since
        seconds = (now - start) * (self.requests / (2 * ended) if ended else 1)
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
