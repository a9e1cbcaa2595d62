"""Throughput of an engine in this process, through the public `penstock.LLM`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.core.types import SamplingParams
from penstock.workbench.bench.environment import describe_environment
from penstock.workbench.bench.load import BenchmarkError
from penstock.workbench.bench.report import OfflineReport
from penstock.workbench.bench.workload import BenchRequest, Workload


class Completion(Protocol):
    """One sample of a result."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class Output(Protocol):
    """The result of one prompt."""

    @property
    def outputs(self) -> Sequence[Completion]: ...

    @property
    def num_cached_tokens(self) -> int: ...

    @property
    def error(self) -> Exception | None: ...


class Generator(Protocol):
    """What this module needs of `penstock.LLM`."""

    def generate(
        self, prompts: Sequence[str | list[int]], sampling_params: Sequence[SamplingParams]
    ) -> Sequence[Output]: ...


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One batch: seconds on the wall, seconds of CPU in this process, tokens in and out, prompt tokens from the prefix cache."""

    wall_s: float
    cpu_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int

    @property
    def output_throughput(self) -> float:
        return self.output_tokens / self.wall_s


def run_batch(llm: Generator, requests: Sequence[BenchRequest], *, temperature: float = 0.0) -> BatchRun:
    """Generate all requests in one call, greedy unless told otherwise, each to exactly its length. Raises BenchmarkError when one fails."""
    prompts = [request.prompt for request in requests]
    sampling = [
        SamplingParams(
            temperature=temperature, max_tokens=request.max_tokens, min_tokens=request.max_tokens, ignore_eos=True
        )
        for request in requests
    ]
    cpu_before, started = time.process_time(), time.perf_counter()
    outputs = llm.generate(prompts, sampling)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_before
    failures = [output.error for output in outputs if output.error is not None]
    if failures:
        raise BenchmarkError(f"{len(failures)} of {len(requests)} requests failed: {failures[0]}")
    return BatchRun(
        wall_s=wall_s,
        cpu_s=cpu_s,
        prompt_tokens=sum(request.prompt_tokens or 0 for request in requests),
        output_tokens=sum(len(sample.token_ids) for output in outputs for sample in output.outputs),
        cached_tokens=sum(output.num_cached_tokens for output in outputs),
    )


def measure_offline(
    load: Callable[[], Generator], workload: Workload, count: int, settings: dict[str, Any]
) -> OfflineReport:
    """Load, warm up with one request, measure prefill (one output token each) and then whole generations, on prompts of their own."""
    environment = describe_environment()
    started = time.perf_counter()
    llm = load()
    load_s = time.perf_counter() - started
    run_batch(llm, workload.requests(1, first=2 * count))
    prefill_requests = [
        BenchRequest(request.index, request.prompt, request.prompt_tokens, 1)
        for request in workload.requests(count, first=count)
    ]
    prefill = run_batch(llm, prefill_requests)
    whole = run_batch(llm, workload.requests(count))
    return OfflineReport(
        environment=environment,
        settings=settings,
        load_s=load_s,
        requests=count,
        prompt_tokens=whole.prompt_tokens,
        output_tokens=whole.output_tokens,
        prefill_s=prefill.wall_s,
        total_s=whole.wall_s,
        prefill_throughput=prefill.prompt_tokens / prefill.wall_s,
        output_throughput=whole.output_throughput,
        total_throughput=(whole.prompt_tokens + whole.output_tokens) / whole.wall_s,
        cpu_s=whole.cpu_s,
    )
