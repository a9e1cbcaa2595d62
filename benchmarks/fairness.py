"""Does a tenant that sends fifty times as much delay the first tokens of another one?

    python benchmarks/fairness.py

The engine runs in its own process, as under `penstock serve`, with its default limits; this process sends to its AsyncEngine, where a
request names its tenant. The large tenant asks for more than the engine can do, the small one for a fiftieth of that; both arrive at
random (open loop). Each round measures the small tenant alone and then beside the large one, under each policy in turn; the small one's
requests are the same in both. TTFT counts from when a request was due, so that a late sender is not hidden.

The goal: the small tenant's p95 TTFT is at most that of the small tenant alone plus two p99 steps. When the p95 of the sender's own
lateness is above a p99 step, the machine was too busy with other things to tell.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common import Model, Options, Results, find_model, script_options
from penstock.core.config import EngineConfig, ServerConfig
from penstock.core.errors import OverloadedError
from penstock.core.transport import SocketDirectory
from penstock.core.types import PING_INTERVAL_S, EngineStats, SamplingParams
from penstock.hub import resolve_model
from penstock.launch import engine_command
from penstock.serving.cluster.supervisor import EngineSupervisor
from penstock.serving.frontend.async_engine import AsyncEngine
from penstock.serving.frontend.client import GenerationRequest, TokensPrompt
from penstock.telemetry.metrics import STEP_SECONDS_BUCKETS
from penstock.workbench.bench.arrival import OpenLoop
from penstock.workbench.bench.compare import interleave
from penstock.workbench.bench.load import BenchmarkError, run_async
from penstock.workbench.bench.metrics import distribution

POLICIES = ("fair", "fcfs")
LARGE, SMALL = "large", "small"
RATIO = 50
# Of what the engine can do: the large tenant alone would be too much for it.
OVERLOAD = 1.5
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128
# The load is on for so long before the small tenant's requests count.
SETTLE_S = 3.0


@dataclass(slots=True)
class Seen:
    """What became of a tenant's requests. Times in seconds; a refused request has no TTFT."""

    ttft_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    completed: int = 0
    refused: int = 0


class Sender:
    """Sends requests to an engine; prompts are random, so that no prefix is found again."""

    def __init__(self, client: AsyncEngine, vocab_size: int) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._random = random.Random(1)
        self._numbers = itertools.count()

    async def send(self, tenant: str, due: float, seen: Seen) -> None:
        """One request from its due time (of the event loop) to its end."""
        clock = asyncio.get_running_loop().time
        seen.lag_s.append(clock() - due)
        request = GenerationRequest(
            request_id=f"{tenant}-{next(self._numbers)}",
            prompt=TokensPrompt([self._random.randrange(3, self._vocab_size) for _ in range(PROMPT_TOKENS)]),
            sampling=SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=0),
            tenant=tenant,
        )
        first = None
        try:
            async for delta in self._client.generate(request):
                if first is None and delta.token_ids:
                    first = clock() - due
        except OverloadedError:
            seen.refused += 1
            return
        if first is not None:
            seen.ttft_s.append(first)
        seen.completed += 1

    async def open_loop(self, tenant: str, rate: float, seconds: float, seed: int) -> Seen:
        """Poisson arrivals for so many seconds; returns when all have ended."""
        clock = asyncio.get_running_loop().time
        begun, seen = clock(), Seen()
        async with asyncio.TaskGroup() as tasks:
            for at in OpenLoop(rate, seed).times(max(1, int(rate * seconds))):
                await asyncio.sleep(begun + at - clock())
                tasks.create_task(self.send(tenant, begun + at, seen))
        return seen

    async def capacity(self, users: int, seconds: float) -> float:
        """Requests per second of a closed loop."""
        clock = asyncio.get_running_loop().time
        begun, seen = clock(), Seen()

        async def user() -> None:
            while clock() - begun < seconds:
                await self.send(LARGE, clock(), seen)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(users):
                tasks.create_task(user())
        return seen.completed / (clock() - begun)


@script_options
def main(options: Options) -> None:
    """TTFT of a small tenant alone and beside one that sends fifty times as much."""
    results = Results("fairness", options)
    head = [
        "model",
        "policy",
        "alone p50 ms",
        "p95",
        "beside p50 ms",
        "p95",
        "p99 step ms",
        "at most p95",
        "verdict",
        "late p95 ms",
    ]
    rows = [[*head, "small done/refused", "large done/refused", "preemptions"]]
    for name in options.choose("stories"):
        data = results.section(name, partial(_measure, find_model(name, options), options))
        rows += [_row(name, policy, data["policies"][policy]) for policy in data["policies"]]
    results.publish(
        rows,
        [
            f"Prompts of {PROMPT_TOKENS} tokens, {OUTPUT_TOKENS} tokens out, default limits of the engine; the large tenant sends "
            f"{OVERLOAD:g} times what the engine can do,",
            f"the small one a {RATIO}th of that. p99 step: from the buckets of penstock_engine_step_seconds while both send, linear "
            "within a bucket. All rounds together.",
        ],
    )


def _row(model: str, policy: str, runs: list[dict[str, Any]]) -> list[str]:
    alone = distribution(value for run in runs for value in run["alone"]["ttft_s"])
    beside = distribution(value for run in runs for value in run["small"]["ttft_s"])
    if alone is None or beside is None:
        raise BenchmarkError("The small tenant got no tokens.")
    step = _percentile([sum(counts) for counts in zip(*(run["step_counts"] for run in runs), strict=True)], 0.99)
    limit = alone.p95 + 2 * step
    figures = (alone.p50, alone.p95, beside.p50, beside.p95, step, limit)
    counts = [
        f"{sum(run[who]['completed'] for run in runs)}/{sum(run[who]['refused'] for run in runs)}"
        for who in ("small", "large")
    ]
    late = distribution(value for run in runs for value in run["lag_s"])
    late_s = 0.0 if late is None else late.p95
    verdict = "yes" if beside.p95 <= limit else "no"
    if late_s > step:
        verdict = "sender late"
    preemptions = sum(run["preemptions"] for run in runs)
    return [
        model,
        policy,
        *(f"{1000 * value:.1f}" for value in figures),
        verdict,
        f"{1000 * late_s:.1f}",
        *counts,
        str(preemptions),
    ]


def _percentile(counts: Sequence[int], share: float) -> float:
    """A percentile of step times from the histogram's buckets (the last one open: its bound)."""
    wanted, below = share * sum(counts), 0
    for index, count in enumerate(counts):
        if below + count >= wanted and count:
            if index == len(STEP_SECONDS_BUCKETS):
                break
            low = STEP_SECONDS_BUCKETS[index - 1] if index else 0.0
            return low + (STEP_SECONDS_BUCKETS[index] - low) * (wanted - below) / count
        below += count
    return STEP_SECONDS_BUCKETS[-1]


def _measure(model: Model, options: Options) -> dict[str, Any]:
    seconds = 6.0 if options.quick else 30.0
    policies: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for number, policy in interleave(list(POLICIES), options.repeat(3, quick=1)):
        run = run_async(_one_round(model, policy, seconds, number))
        policies[policy].append(run)
        alone, small = distribution(run["alone"]["ttft_s"]), distribution(run["small"]["ttft_s"])
        if alone is None or small is None:
            raise BenchmarkError("The small tenant got no tokens.")
        print(
            f"  {number} {policy:4} capacity {run['capacity']:.0f}/s   p95 alone {1000 * alone.p95:7.1f} ms   "
            f"beside {1000 * small.p95:7.1f} ms   sender late at most {1000 * max(run['lag_s']):.1f} ms",
            flush=True,
        )
    return {"seconds": seconds, "policies": policies}


async def _one_round(model: Model, policy: str, seconds: float, seed: int) -> dict[str, Any]:
    async with _engine(model, policy) as client:
        info = await client.model_info()
        sender = Sender(client, info.vocab_size)
        capacity = await sender.capacity(2 * info.max_num_seqs, 4.0)
        large_rate = OVERLOAD * capacity
        small_rate = large_rate / RATIO
        alone = await sender.open_loop(SMALL, small_rate, seconds, seed)
        large = asyncio.create_task(sender.open_loop(LARGE, large_rate, SETTLE_S + seconds, seed + 1000))
        await asyncio.sleep(SETTLE_S)
        before = await _stats(client)
        small = await sender.open_loop(SMALL, small_rate, seconds, seed)
        after = await _stats(client)
        flood = await large
    return {
        "capacity": capacity,
        "alone": _summary(alone),
        "small": _summary(small),
        "large": {"completed": flood.completed, "refused": flood.refused},
        "lag_s": small.lag_s,
        "step_counts": [
            late - early for late, early in zip(after.step_seconds_buckets, before.step_seconds_buckets, strict=True)
        ],
        "preemptions": after.preemptions - before.preemptions,
    }


def _summary(seen: Seen) -> dict[str, Any]:
    return {"ttft_s": seen.ttft_s, "completed": seen.completed, "refused": seen.refused}


async def _stats(client: AsyncEngine) -> EngineStats:
    """A snapshot that is not older than this call."""
    asked = await client.stats()
    for _ in range(100):
        await asyncio.sleep(PING_INTERVAL_S / 10)
        stats = await client.stats()
        if stats is not None and stats is not asked:
            return stats
    raise BenchmarkError("The engine sends no statistics.")


@asynccontextmanager
async def _engine(model: Model, policy: str) -> AsyncIterator[AsyncEngine]:
    """An engine in its own process. Without a tokenizer: token ids in, token ids out."""
    config = EngineConfig(**model.settings, scheduling_policy=policy)
    server = ServerConfig(log_level="warning")
    client = AsyncEngine(None)
    sockets = SocketDirectory()
    supervisor = EngineSupervisor(
        engine_command(config, resolve_model(config.model), log_level=server.log_level, log_format=server.log_format),
        new_address=sockets.new_address,
        on_ready=client.engine_ready,
        on_lost=client.engine_lost,
        on_gone=client.engine_gone,
        finished_requests=lambda: client.finished_requests,
    )
    try:
        await supervisor.start()
        yield client
    finally:
        await client.close()
        await supervisor.stop()
        sockets.close()


if __name__ == "__main__":
    main()
