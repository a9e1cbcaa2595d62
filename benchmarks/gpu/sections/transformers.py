"""Penstock beside the continuous batching of transformers: the same model, requests and process, in turns.

The requests are the first of nano-vllm's, cut short, because SDPA without a flash kernel is all that a bare machine gives transformers.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.engines import Engine, Setup, load
from benchmarks.gpu.records import Record
from benchmarks.gpu.tables import median, median_and_range
from benchmarks.gpu.workloads import Nano, nano, shortened

from penstock.workbench.bench.compare import paired_ratio
from penstock.workbench.bench.load import BenchmarkError
from penstock.workbench.bench.report import markdown_table

if TYPE_CHECKING:
    import torch

TITLE = "Beside transformers"
SHAPE = "tinyllama-1.1b"
SEQUENCES, LONGEST = 64, 256
KV_CACHE_GIB = 8.0
# Of the memory that is free once both models are there.
PEER_MEMORY = 0.5
ROUNDS_BUDGET_S = 100.0


def cases(plan: Plan) -> list[Case]:
    return [Case("transformers", SHAPE, "transformers", 150.0, partial(_measure, Setup(SHAPE)))]


def _measure(setup: Setup, context: Context) -> dict[str, Any]:
    plan = context.plan
    asked = nano(2, low=2, high=4) if plan.tiny else shortened(nano(), SEQUENCES, LONGEST)
    seconds: dict[str, list[float]] = {"penstock": [], "transformers": []}
    engine = load(setup, plan, **({} if plan.tiny else {"kv_cache_gib": KV_CACHE_GIB}))
    try:
        with _peer(setup, plan, asked) as peer:
            peer.run(asked, 1000)
            engine.run(asked.requests(1000))
            started, number = time.perf_counter(), 0
            while number < plan.rounds and (number < 2 or time.perf_counter() - started < ROUNDS_BUDGET_S):
                _round(engine, peer, asked, number, seconds)
                number += 1
            described = peer.described()
    finally:
        engine.shutdown()
    return {
        "shape": setup.shape,
        "prompt_tokens": asked.prompt_tokens,
        "output_tokens": asked.output_tokens,
        "seconds": seconds,
        "engine": engine.described(),
        "peer": described,
    }


def _round(engine: Engine, peer: Peer, asked: Nano, number: int, seconds: dict[str, list[float]]) -> None:
    """Both engines once, the first one in turns."""
    for name in ("penstock", "transformers") if number % 2 == 0 else ("transformers", "penstock"):
        taken = engine.run(asked.requests(number)).wall_s if name == "penstock" else peer.run(asked, number)
        seconds[name].append(taken)


class Peer:
    """A manager of transformers' continuous batching, warmed up. Its loop starts with the first requests, which some versions insist on."""

    def __init__(self, manager: Any, attention: str) -> None:
        self._manager = manager
        self._attention = attention
        self._started = False

    def run(self, asked: Nano, number: int) -> float:
        """Seconds until every request has its whole output. Raises BenchmarkError when one fails or is short."""
        requests = asked.requests(number)
        started = time.perf_counter()
        for request in requests:
            self._manager.add_request(list(request.prompt), max_new_tokens=request.max_tokens, eos_token_id=-1)
        if not self._started:
            self._manager.start()
            self._started = True
        tokens = done = 0
        while done < len(requests):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise BenchmarkError("transformers' generation thread has ended")
            elif result.error is not None:
                raise BenchmarkError(f"transformers failed: {result.error}")
            elif result.is_finished():
                tokens, done = tokens + len(result.generated_tokens), done + 1
        if tokens != asked.output_tokens:
            raise BenchmarkError(f"transformers gave {tokens} tokens instead of {asked.output_tokens}")
        return time.perf_counter() - started

    def described(self) -> str:
        return f"attention {self._attention}"

    def stop(self) -> None:
        """End its thread and give its cache back."""
        if self._started:
            self._manager.stop(block=True, timeout=10.0)


@contextmanager
def _peer(setup: Setup, plan: Plan, asked: Nano) -> Iterator[Peer]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    fields = json.loads((setup.folder(plan) / "config.json").read_text())
    config = AutoConfig.for_model(**fields)
    with torch.device(plan.device):
        dtype = torch.float32 if plan.tiny else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(asked.outputs))
    if plan.tiny:
        # Called block_size before transformers 5.18.
        names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        size = {"page_size" if "page_size" in names else "block_size": 16}
        batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, **size)
    else:
        batching = ContinuousBatchingConfig(max_memory_percent=PEER_MEMORY, allow_block_sharing=False)
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    manager.warmup()
    peer = Peer(manager, str(model.config._attn_implementation))
    try:
        yield peer
    finally:
        peer.stop()
        del manager, peer
        _free(model)


def _free(model: torch.nn.Module) -> None:
    import torch

    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(data: dict[str, Any], record: Record) -> str:
    rates = {name: data["output_tokens"] / median(values) for name, values in data["seconds"].items()}
    return ", ".join(f"{name} {rate:,.0f} tok/s" for name, rate in rates.items())


def report(records: Sequence[Record]) -> list[str]:
    rows = [["model", "requests", "Penstock tok/s", "transformers tok/s", "ratio", "faster", "transformers ran"]]
    for record in records:
        if record.data is None:
            continue
        data = record.data
        own, peer = (
            [data["output_tokens"] / value for value in data["seconds"][name]] for name in ("penstock", "transformers")
        )
        ratio = paired_ratio(own, peer)
        verdict = {"yes": "transformers", "no": "Penstock", "undecided": "undecided"}[ratio.below(1.0)]
        asked = f"{data['prompt_tokens']:,} in, {data['output_tokens']:,} out"
        cells = [median_and_range(own), median_and_range(peer), ratio.text(2), verdict, data["peer"]]
        rows.append([data["shape"], asked, *cells])
    text = (
        f"The first {SEQUENCES} sequences of nano-vllm's workload, cut to {LONGEST} tokens in and out, greedy, random weights in bf16, "
        "everything at once, prefill included; continuous batching as transformers configures itself, without prefix sharing."
    )
    return [text, "", markdown_table(rows)]
