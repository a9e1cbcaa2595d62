"""One measured run against a server: warm up, drive the load, and account for the generator's own cost."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from penstock.core.errors import PenstockError
from penstock.workbench.bench.arrival import Arrival, ClosedLoop, drive
from penstock.workbench.bench.client import Client, Target
from penstock.workbench.bench.record import RequestRecord
from penstock.workbench.bench.workload import BenchRequest, Workload

Result = TypeVar("Result")


class BenchmarkError(PenstockError):
    """A measurement cannot be made. The message is one line."""


@dataclass(frozen=True, slots=True)
class LoadRun:
    """Records in the order of the requests, and the CPU seconds that this process spent while they ran."""

    records: list[RequestRecord]
    client_cpu_s: float


async def run_load(
    target: Target, workload: Workload, arrival: Arrival, count: int, *, warmup: int = 0, first: int = 0
) -> LoadRun:
    """Send `count` requests of `workload`, from number `first` on, after `warmup` unmeasured ones that are drawn from behind them.

    Raises BenchmarkError when no warm-up request succeeds, because nothing after that would be worth measuring.
    """
    async with Client(target) as client:
        if warmup:
            await warm_up(client, workload.requests(warmup, first=first + count))
        items = [(request, client.encode(request)) for request in workload.requests(count, first=first)]

        async def send(item: tuple[BenchRequest, bytes], due: float) -> RequestRecord:
            return await client.send(item[0], due, item[1])

        cpu_before = time.process_time()
        records = await drive(arrival, items, send)
        return LoadRun(records, time.process_time() - cpu_before)


async def warm_up(client: Client, requests: list[BenchRequest]) -> None:
    """Send requests one after the other. Raises BenchmarkError when none succeeds."""
    records = await drive(ClosedLoop(1), requests, client.send)
    if all(record.error is not None for record in records):
        raise BenchmarkError(
            f"{client.target.url}: no warm-up request succeeds: {records[-1].error} {records[-1].detail}"
        )


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """Run `main` on uvloop where it is installed (half the CPU per event), else on asyncio's own loop."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.run(main)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
