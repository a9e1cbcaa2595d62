"""What happens to eight running streams when a 2,000-token prompt arrives, and what does a cap on prefill per step change?

    python benchmarks/prefill_interference.py

Eight streams decode; after a while the long prompt is sent; until its first token comes, the gaps between the eight streams'
tokens are the figure. Each cap is a server of its own, started in turns over the rounds. "off": the whole prompt may go into one step.

    streams   | … decode … |  before  |  during: long prompt is prefilled  | left
    long prompt                       sent                        first token
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from functools import partial
from typing import Any

from common import Model, Options, Results, find_model, script_options, served_name, start_server
from penstock.workbench.bench.client import Client, Target
from penstock.workbench.bench.compare import interleave
from penstock.workbench.bench.http import Response
from penstock.workbench.bench.load import BenchmarkError, run_async, warm_up
from penstock.workbench.bench.metrics import distribution
from penstock.workbench.bench.record import read_events
from penstock.workbench.bench.workload import Lengths, Workload

STREAMS, LONG_PROMPT = 8, 2000
STREAM_PROMPT = 16
EVENTS_BEFORE, EVENTS_WARM = 20, 4
# label → (token budget of a step, cap on prefill while others decode)
CAPS = {"off": (4096, 4096), "512": (512, 512), "128": (512, 128), "64": (512, 64), "32": (512, 32)}
QUICK_CAPS = ("off", "64")


@script_options
def main(options: Options) -> None:
    """Inter-token latency of eight streams before and while a 2,000-token prompt is prefilled, for several caps."""
    results = Results("prefill_interference", options)
    rows = [["model", "cap", "before p50 ms", "p99", "max", "during p50 ms", "p99", "max", "long TTFT ms", "rounds"]]
    for name in options.choose("qwen2.5-0.5b"):
        data = results.section(name, partial(_measure, find_model(name, options), options))
        for cap, runs in data["caps"].items():
            rows.append(
                [name, cap, *_columns(runs, "before_s"), *_columns(runs, "during_s"), _long(runs), str(len(runs))]
            )
    results.publish(
        rows,
        [
            f"{STREAMS} streams and a prompt of {LONG_PROMPT} tokens (less where the context is shorter); a gap is one between",
            "events; p50, p99 and max over all streams and rounds; long TTFT is the median and the range over rounds.",
        ],
    )


def _columns(runs: list[dict[str, Any]], key: str) -> list[str]:
    values = distribution(gap for run in runs for gap in run[key])
    return (
        ["–"] * 3 if values is None else [f"{seconds * 1000:.1f}" for seconds in (values.p50, values.p99, values.max)]
    )


def _long(runs: list[dict[str, Any]]) -> str:
    values = [run["long_ttft_s"] * 1000 for run in runs]
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def _measure(model: Model, options: Options) -> dict[str, Any]:
    caps = list(QUICK_CAPS if options.quick else CAPS)
    runs: dict[str, list[dict[str, Any]]] = {cap: [] for cap in caps}
    for number, cap in interleave(caps, options.repeat(3, quick=1)):
        budget, most = CAPS[cap]
        limits = {"max_num_batched_tokens": budget, "max_prefill_tokens_while_decoding": most, "max_num_seqs": 16}
        with start_server(model, **limits) as server:
            target = Target(url=server.url, model=served_name(server.url))
            run = run_async(_one_arrival(target, model.context))
        runs[cap].append(run)
        worst = max(run["during_s"], default=0.0) * 1000
        print(
            f"  {number} cap {cap:4} longest gap {worst:8.1f} ms, long TTFT {run['long_ttft_s'] * 1000:8.1f} ms",
            flush=True,
        )
    return {"long_prompt": _long_prompt(model.context), "caps": runs}


def _long_prompt(context: int) -> int:
    return min(LONG_PROMPT, context - 32)


async def _one_arrival(target: Target, context: int) -> dict[str, Any]:
    """Gaps of the streams before and during the prefill of one long prompt, in seconds, and the long prompt's TTFT."""
    longest = context - STREAM_PROMPT
    short = _workload(STREAM_PROMPT, longest)
    long_request = _workload(_long_prompt(context), 1).requests(1)[0]
    async with Client(target) as client:
        await warm_up(client, _workload(STREAM_PROMPT, 4).requests(2))
        responses = [Response() for _ in range(STREAMS)]
        streams = [
            asyncio.create_task(client.send(request, time.perf_counter(), response=response))
            for request, response in zip(short.requests(STREAMS), responses, strict=True)
        ]
        await _until_each_has(responses, EVENTS_WARM, streams)
        start = time.perf_counter()
        await _until_each_has(responses, EVENTS_WARM + EVENTS_BEFORE, streams)
        sent = time.perf_counter()
        record = await client.send(long_request, sent)
        if record.error is not None or any(stream.done() for stream in streams):
            raise BenchmarkError(f"The long prompt failed or the streams ended first: {record.error} {record.detail}")
        first_token = record.arrivals[0][0]
        await _until_each_has(responses, max(len(response.events) for response in responses) + 1, streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    gaps = [gap for response in responses for gap in _gaps(response)]
    return {
        "long_ttft_s": first_token - sent,
        "before_s": [end - begin for begin, end in gaps if start <= begin and end <= sent],
        "during_s": [end - begin for begin, end in gaps if begin < first_token and end > sent],
    }


def _workload(prompt: int, output: int) -> Workload:
    return Workload(
        input_lengths=Lengths(prompt, prompt), output_lengths=Lengths(output, output), seed=random.getrandbits(32)
    )


def _gaps(response: Response) -> list[tuple[float, float]]:
    """(begin, end) of the time between one event with tokens and the next."""
    times = [at for at, _ in read_events(response).arrivals]
    return list(itertools.pairwise(times))


async def _until_each_has(
    responses: list[Response], events: int, streams: list[asyncio.Task[Any]], timeout_s: float = 300.0
) -> None:
    """Wait until each response has that many events. Raises BenchmarkError when a stream ends before."""
    async with asyncio.timeout(timeout_s):
        while any(len(response.events) < events for response in responses):
            if any(stream.done() for stream in streams):
                raise BenchmarkError(
                    "A stream ended before the long prompt was through; the model's context is too short."
                )
            await asyncio.sleep(0.005)


if __name__ == "__main__":
    main()
