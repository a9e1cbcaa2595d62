"""Usage records for tests of the ledger, and a database that does as it is told."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.accounts.interface import UsageOutcome, UsageRecord
from penstock.serving.gateway.accounts.ledger import BadRecordError
from penstock.serving.gateway.accounts.prices import PricedUsage
from penstock.serving.gateway.cache.interface import CacheOutcome

# 2026-03-01 00:00:00 UTC
MARCH = 1772323200.0
DAY_S = 86400.0


def usage(
    request_id: str,
    *,
    at: float = MARCH,
    key: str = "key",
    tenant: str = "acme",
    model: str = "small",
    outcome: UsageOutcome = "completed",
    cache: CacheOutcome = "miss",
    prompt: int = 10,
    cached: int = 0,
    output: int = 5,
) -> UsageRecord:
    return UsageRecord(
        request_id=request_id,
        at=at,
        key_id=key,
        tenant=tenant,
        model=model,
        outcome=outcome,
        cache=cache,
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=output,
    )


class FakeWriter:
    """Counts each request id once. `away`: refuses everything. `lose_acknowledgements`: commits and then fails, so many times."""

    def __init__(self) -> None:
        self.away = False
        self.lose_acknowledgements = 0
        self.bad: set[str] = set()
        self.written: dict[str, PricedUsage] = {}
        self.batches: list[int] = []
        self.attempts = 0

    async def write(self, batch: Sequence[PricedUsage]) -> int:
        self.attempts += 1
        if self.away:
            raise StoreUnavailableError("connection refused")
        if any(item.usage.request_id in self.bad for item in batch):
            raise BadRecordError("value out of range")
        new = {item.usage.request_id: item for item in batch if item.usage.request_id not in self.written}
        self.written.update(new)
        self.batches.append(len(batch))
        if self.lose_acknowledgements:
            self.lose_acknowledgements -= 1
            raise StoreUnavailableError("connection reset")
        return len(new)

    async def housekeeping(self) -> None:
        """Nothing to do."""
