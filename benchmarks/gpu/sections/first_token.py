"""Time to the first token of 1,024 with an idle engine, and while 32 others decode. Through AsyncLLM in this process, without HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.engines import LOAD_S, Setup, draw_prompts
from benchmarks.gpu.records import Record
from benchmarks.gpu.roofline import Card, prefill_seconds, step_bytes
from benchmarks.gpu.tables import NONE, TARGET_HEAD, bandwidth, median, median_and_range, peak, target_cells
from benchmarks.gpu.targets import TTFT_MS

from penstock.core.config import EngineConfig
from penstock.core.types import SamplingParams
from penstock.llm import AsyncLLM
from penstock.serving.frontend.client import EngineClient, GenerationRequest, TokensPrompt
from penstock.workbench.bench.report import markdown_table

TITLE = "Time to the first token"
SHAPES = ("tinyllama-1.1b", "llama-3.1-8b")
MEASURE_S = 15.0
# Between two arrivals under load.
PAUSE_S = 0.1


@dataclass(frozen=True)
class Load:
    """prompt: tokens whose first answer is waited for; others, other_tokens: requests that decode meanwhile, and how long at most."""

    prompt: int = 1024
    arrivals: int = 15
    others: int = 32
    other_prompt: int = 512
    other_tokens: int = 3500


@dataclass
class _Stream:
    """One request of the background: how many tokens it has, and the gaps between its deltas."""

    gaps: list[float] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)


def cases(plan: Plan) -> list[Case]:
    return [
        Case("first_token", shape, f"first token {shape}", MEASURE_S, partial(_measure, Setup(shape)), LOAD_S[shape])
        for shape in (SHAPES[:1] if plan.tiny else SHAPES)
    ]


def _measure(setup: Setup, context: Context) -> dict[str, Any]:
    load = Load(32, 2, 2, 16, 40) if context.plan.tiny else Load()
    config = EngineConfig(**setup.engine_settings(context.plan))
    return asyncio.run(_measure_client(config, setup, load))


async def _measure_client(config: EngineConfig, setup: Setup, load: Load) -> dict[str, Any]:
    async with AsyncLLM(config) as client:
        ids = itertools.count()
        for prompt in draw_prompts(3, load.prompt, f"{setup.name}/warm-up"):
            await _first_token(client, next(ids), prompt)
        idle = []
        for prompt in draw_prompts(load.arrivals, load.prompt, f"{setup.name}/idle"):
            idle.append(await _first_token(client, next(ids), prompt))
            await asyncio.sleep(0.02)
        loaded, gaps, alone = await _under_load(client, setup, load, ids)
    return {
        "shape": setup.shape,
        "load": msgspec.to_builtins(load),
        "idle_s": idle,
        "loaded_s": loaded,
        "gap_alone_s": alone,
        "gap_loaded_s": gaps,
    }


async def _under_load(
    client: EngineClient, setup: Setup, load: Load, ids: itertools.count[int]
) -> tuple[list[float], list[float], list[float]]:
    """(first tokens, gaps of the others while they came, gaps of the others before)."""
    streams = [_Stream() for _ in range(load.others)]
    prompts = draw_prompts(load.others, load.other_prompt, f"{setup.name}/others")
    tasks = [
        asyncio.create_task(_decode(client, next(ids), prompt, load.other_tokens, stream))
        for prompt, stream in zip(prompts, streams, strict=True)
    ]
    try:
        await asyncio.gather(*(stream.started.wait() for stream in streams))
        await asyncio.sleep(5 * PAUSE_S)
        alone = _taken(streams)
        times = []
        for prompt in draw_prompts(load.arrivals, load.prompt, f"{setup.name}/loaded"):
            times.append(await _first_token(client, next(ids), prompt))
            await asyncio.sleep(PAUSE_S)
        return times, _taken(streams), alone
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _taken(streams: Sequence[_Stream]) -> list[float]:
    """Median, 99th percentile and longest of all gaps since the last call."""
    gaps = sorted(gap for stream in streams for gap in stream.gaps)
    for stream in streams:
        stream.gaps.clear()
    return [gaps[len(gaps) // 2], gaps[int(0.99 * (len(gaps) - 1))], gaps[-1]] if gaps else []


def _request(number: int, prompt: list[int], tokens: int) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=0)
    return GenerationRequest(request_id=f"bench-{number}", prompt=TokensPrompt(prompt), sampling=sampling)


async def _first_token(client: EngineClient, number: int, prompt: list[int]) -> float:
    started = time.perf_counter()
    seconds = 0.0
    async for delta in client.generate(_request(number, prompt, 1)):
        if delta.token_ids and not seconds:
            seconds = time.perf_counter() - started
    return seconds


async def _decode(client: EngineClient, number: int, prompt: list[int], tokens: int, stream: _Stream) -> None:
    last = 0.0
    async for _ in client.generate(_request(number, prompt, tokens)):
        now = time.perf_counter()
        if last:
            stream.gaps.append(now - last)
        last = now
        stream.started.set()


def line(data: dict[str, Any], record: Record) -> str:
    return f"{median(data['idle_s']) * 1e3:.1f} ms idle, {median(data['loaded_s']) * 1e3:.1f} ms under load"


def report(records: Sequence[Record]) -> list[str]:
    head = ["model", "idle ms", "bound ms", *TARGET_HEAD, "under load ms", "longest under load ms"]
    rows = [[*head, "gap of the others ms: median before", "median", "p99"]]
    for record in records:
        if record.data is None:
            continue
        data = record.data
        plan = record.plan
        setup = Setup(data["shape"])
        idle = [1e3 * seconds for seconds in data["idle_s"]]
        loaded = [1e3 * seconds for seconds in data["loaded_s"]]
        rows.append(
            [
                setup.name,
                median_and_range(idle, 1),
                f"{1e3 * _bound(setup, plan, data['load']['prompt'], record):.1f}",
                *target_cells(TTFT_MS.get(setup.shape), idle),
                median_and_range(loaded, 1),
                f"{max(loaded):.1f}",
                *(NONE if gap is None else f"{1e3 * gap:.1f}" for gap in _gaps(data)),
            ]
        )
    load = Load()
    text = (
        f"From the call of the client to its first token, in one process without HTTP; {load.prompt:,} unique tokens. Under load: "
        f"{load.others} others decode on {load.other_prompt} tokens each, and an arrival follows the last one's first token after "
        f"{PAUSE_S * 1e3:.0f} ms. Bound: the products of the prompt, or the weights read once."
    )
    return [text, "", markdown_table(rows)]


def _gaps(data: dict[str, Any]) -> list[float | None]:
    """Median before the arrivals, median and 99th percentile while they came; None when the others were done before."""
    alone, loaded = data["gap_alone_s"], data["gap_loaded_s"]
    return [alone[0] if alone else None, *(loaded[:2] or [None, None])]


def _bound(setup: Setup, plan: Plan, tokens: int, record: Record) -> float:
    sizes = setup.sizes(plan)
    card = Card(bandwidth(record), peak(record))
    return max(prefill_seconds(sizes, tokens, card), step_bytes(sizes, setup.weights, 1, tokens) / card.bandwidth)
