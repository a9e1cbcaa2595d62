"""The response cache as an endpoint uses it: one object that knows answers, generations in flight and what a request wants of them.

    plan(…)                                    what the request wants; its key
    await lookup(plan)  ─▶ entry               a hit: ReplayStream; passes limits, needs no engine
    … limits, admission …
    peek(plan)          ─▶ entry               it was completed in the meantime
    find(plan)          ─▶ flight.subscribe    coalesced
    open(plan, …)       ─▶ flight.subscribe    miss: a generation of its own, which others may join

No await may stand between `peek`, `find`, `open` and `subscribe`: then an identical request can never begin a second generation.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import ModelInfo, SamplingParams
from penstock.serving.frontend.client import Prompt
from penstock.serving.gateway.cache.flights import Flight, Flights, Start
from penstock.serving.gateway.cache.interface import CacheStore, Entry, FlightStore
from penstock.serving.gateway.cache.key import request_key
from penstock.serving.gateway.cache.memory_store import MemoryStore
from penstock.serving.gateway.cache.policy import NotCachedError, Plan, make_plan, parse_cache_control
from penstock.serving.gateway.cache.write_behind import WriteBehind
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.schemas.sampling import CacheOptions
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.telemetry.recorder import Recorder

_MIB = 1024 * 1024


class AnswerStore(CacheStore, Protocol):
    """A CacheStore that never makes a request wait for a write: MemoryStore, or WriteBehind in front of another."""

    def peek(self, key: str) -> Entry | None:
        """What this process knows without asking: at least what it completed in the last seconds."""
        ...

    def put_nowait(self, key: str, entry: Entry, ttl_s: float) -> None: ...


class KeyMemo:
    """The last key that was made for one body."""

    __slots__ = ("_info", "_model_name", "_tenant", "key")

    def __init__(self) -> None:
        self._info: ModelInfo | None = None
        self._tenant: str | None = None
        self._model_name = ""
        self.key = ""

    def is_for(self, info: ModelInfo, tenant: str | None, model_name: str) -> bool:
        """Whether `key` is that of this model and tenant. The engine's ModelInfo is one object for as long as it runs."""
        return self._info is info and self._tenant == tenant and self._model_name == model_name

    def note(self, info: ModelInfo, tenant: str | None, model_name: str, key: str) -> None:
        """Remember."""
        self._info, self._tenant, self._model_name, self.key = info, tenant, model_name, key


class ResponseCache:
    """`store` None: nothing is kept and nothing is shared. `clock`: Unix time. Owns what it is given and closes it."""

    def __init__(
        self,
        store: AnswerStore | None,
        flights: Flights,
        config: GatewayConfig,
        version: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._flights = flights
        self._config = config
        self._version = version
        self._clock = clock

    @property
    def enabled(self) -> bool:
        """Whether any answer can come from here."""
        return self._store is not None

    def plan(
        self,
        *,
        identity: Identity,
        model_name: str,
        info: ModelInfo | None,
        endpoint: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        client_seed: bool,
        cache_salt: str,
        headers: Iterable[tuple[bytes, bytes]],
        body_cache: CacheOptions | None,
        memo: KeyMemo | None = None,
    ) -> Plan:
        """What the cache does for this request; nothing while the model is not known (`info` None). `headers` are ASGI's,
        `body_cache` is the body's `cache`. `memo` belongs to this endpoint and to a body with these prompts, sampling and salt."""
        if info is None or self._store is None:
            return Plan(None, only_if_cached=parse_cache_control(headers).only_if_cached)
        tenant = None if self._config.response_cache_shared else identity.tenant

        def make_key() -> str:
            if memo is not None and memo.is_for(info, tenant, model_name):
                return memo.key
            key = request_key(
                version=self._version,
                model_name=model_name,
                info=info,
                endpoint=endpoint,
                prompts=prompts,
                sampling=sampling,
                cache_salt=cache_salt,
                tenant=tenant,
            )
            if memo is not None:
                memo.note(info, tenant, model_name, key)
            return key

        return make_plan(
            make_key,
            model=info,
            sampling=sampling,
            client_seed=client_seed,
            headers=headers,
            options=body_cache,
            default_ttl_s=self._config.response_cache_ttl_s,
        )

    async def lookup(self, plan: Plan) -> Entry | None:
        """The answer that is kept. Raises NotCachedError when there is none and the client wants no other."""
        entry = await self._kept(plan)
        if entry is None and plan.only_if_cached:
            raise NotCachedError("There is no stored answer to this request, and Cache-Control says only-if-cached.")
        return entry

    def peek(self, plan: Plan) -> Entry | None:
        """The answer, if it was completed here since the look-up."""
        if self._store is None or plan.key is None or not plan.may_read:
            return None
        return self._young_enough(plan, self._store.peek(plan.key))

    def find(self, plan: Plan) -> Flight | None:
        """The generation in flight that answers this request."""
        return self._flights.find(plan.key) if plan.key is not None and plan.may_read else None

    def open(
        self,
        plan: Plan,
        start: Start,
        on_end: Callable[[], None],
        model_now: Callable[[], Awaitable[ModelInfo]] | None = None,
    ) -> Flight:
        """Begin the generation of a plan with a key; a whole answer is kept. See `Flights.open`.

        `start` generates with `plan.sampling(…)` and without a time-out: every reader has its own. `model_now` (`EngineClient.model_info`):
        an answer that came from another model than the plan's, because the engine was restarted in between, is not kept.
        """
        store, key = self._store, plan.key
        if store is None or key is None:
            raise ValueError("A request that bypasses the cache shares no generation.")

        async def keep(entry: Entry) -> None:
            if model_now is None or await model_now() == plan.model:
                store.put_nowait(key, entry, plan.ttl_s)

        recheck = (lambda: self._kept(plan)) if plan.may_read else None
        return self._flights.open(key, start, on_end, keep, recheck=recheck)

    async def close(self) -> None:
        """End what is in flight, write what waits to be written."""
        await self._flights.close()
        if self._store is not None:
            await self._store.close()

    async def _kept(self, plan: Plan) -> Entry | None:
        if self._store is None or plan.key is None or not plan.may_read:
            return None
        return self._young_enough(plan, await self._store.get(plan.key)) or self.peek(plan)

    def _young_enough(self, plan: Plan, entry: Entry | None) -> Entry | None:
        if entry is None or self._clock() - entry.created_at >= plan.max_age_s:
            return None
        return entry


def build_cache(
    config: GatewayConfig,
    recorder: Recorder,
    version: str,
    *,
    redis: RedisLink | None = None,
    shared_store: CacheStore | None = None,
    shared_flights: FlightStore | None = None,
) -> ResponseCache:
    """What the settings ask for. `shared_store` and `shared_flights` are the coordinator's, where there are several gateway processes
    and no Redis; with Redis, generations in flight are shared through it wherever answers are kept."""
    mode = config.response_cache
    if mode == "auto":
        mode = "memory" if redis is None else "redis"
    if mode == "off":
        return ResponseCache(None, Flights(), config, version)
    store: AnswerStore
    slow: WriteBehind | None = None
    if mode == "redis" and redis is not None:
        from penstock.serving.gateway.cache.redis_store import RedisStore

        store = slow = WriteBehind(RedisStore(redis, recorder), recorder)
    elif shared_store is not None:
        store = slow = WriteBehind(shared_store, recorder)
    else:
        store = MemoryStore(int(config.response_cache_mib * _MIB), recorder)
    if redis is not None:
        from penstock.serving.gateway.cache.redis_flight_store import RedisFlightStore

        shared_flights = RedisFlightStore(redis)
    if shared_flights is None:
        return ResponseCache(store, Flights(), config, version)
    from penstock.serving.gateway.cache.shared_flights import SharedFlights

    return ResponseCache(store, SharedFlights(shared_flights, None if slow is None else slow.written), config, version)
