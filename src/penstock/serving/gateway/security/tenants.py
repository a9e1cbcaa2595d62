"""Limits and weight of the tenant that a token names. A key brings its tenant's with it; a token knows nothing of accounts.

What is known is used at once and read again behind the request when it is older than FRESH_S, so a change holds from the first request
after that on, and a database that is away changes nothing for tenants that were seen before. Only the first request of a tenant
waits for the database.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from penstock.core.errors import NotFoundError, StoreUnavailableError
from penstock.serving.gateway.identity import NO_LIMITS, Identity, RateLimits

if TYPE_CHECKING:
    from penstock.serving.gateway.accounts.admin import TenantInfo

logger = logging.getLogger(__name__)

FRESH_S = 1.0
MAX_TENANTS = 4096


class TenantSource(Protocol):
    """Where tenants are kept (KeyAdmin)."""

    async def tenant(self, name: str) -> TenantInfo:
        """Raises NotFoundError, StoreUnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class _Terms:
    """`asked_at`: when the database was last asked, whether it answered or not."""

    limits: RateLimits
    weight: float
    asked_at: float


class TenantTerms:
    """Used from one event loop. Bounded: the tenants used last are remembered."""

    def __init__(self, source: TenantSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._known: OrderedDict[str, _Terms] = OrderedDict()
        self._loading: dict[str, asyncio.Task[_Terms]] = {}

    @property
    def remembered(self) -> int:
        """Tenants in memory."""
        return len(self._known)

    async def apply(self, identity: Identity) -> Identity:
        """`identity` with what holds for its tenant. Raises StoreUnavailableError when that was never known and cannot be had now."""
        name = identity.tenant
        terms = self._known.get(name)
        if terms is None:
            # Shielded: others may wait for the same answer.
            terms = await asyncio.shield(self._load(name))
        else:
            self._known.move_to_end(name)
            if self._clock() - terms.asked_at >= FRESH_S:
                self._load(name)
        return replace(identity, tenant_limits=terms.limits, weight=terms.weight)

    def _load(self, name: str) -> asyncio.Task[_Terms]:
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._read(name))
            # The request that began it may be gone before it fails.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _read(self, name: str) -> _Terms:
        now = self._clock()
        try:
            settings = (await self._source.tenant(name)).settings
            limits = RateLimits(settings.rpm, settings.tpm, settings.concurrency)
            terms = _Terms(limits, 1.0 if settings.weight is None else settings.weight, now)
        except NotFoundError:
            terms = _Terms(NO_LIMITS, 1.0, now)
        except StoreUnavailableError:
            known = self._known.get(name)
            if known is None:
                raise
            terms = replace(known, asked_at=now)
        except Exception:
            # A fault of ours: whoever waits gets it; behind a request it is said here, and what is known stays in force.
            known = self._known.get(name)
            if known is None:
                raise
            logger.exception("reading the limits of a tenant failed unexpectedly")
            terms = replace(known, asked_at=now)
        finally:
            del self._loading[name]
        self._known[name] = terms
        if len(self._known) > MAX_TENANTS:
            self._known.popitem(last=False)
        return terms
