"""How much faster is the first token of a second question on the same document?

    python benchmarks/document_qa.py

Each round takes a document that the server has never seen, asks one question on it and, when that is answered, another one. The questions
have nothing in common; only the document can come from the prefix cache.
"""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any

from common import Model, Options, Results, find_model, script_options, served_name, start_server
from penstock.workbench.bench.arrival import ClosedLoop
from penstock.workbench.bench.client import Target
from penstock.workbench.bench.compare import paired_ratio
from penstock.workbench.bench.load import BenchmarkError, run_async, run_load
from penstock.workbench.bench.metrics import ttft
from penstock.workbench.bench.workload import Lengths, Workload

DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 2000, 24, 8
LIMIT = 1 / 8


@script_options
def main(options: Options) -> None:
    """TTFT of the second question on a 2,000-token document, divided by the first's."""
    results = Results("document_qa", options)
    rows = [
        [
            "model",
            "document",
            "first TTFT ms",
            "second TTFT ms",
            "second/first (median, interval)",
            "cached",
            "at most 1/8",
        ]
    ]
    for name in options.choose("qwen2.5-0.5b", "tinyllama-1.1b"):
        data = results.section(name, partial(_measure, find_model(name, options), options))
        ratio = paired_ratio(data["second_s"], data["first_s"])
        medians = [f"{statistics.median(data[key]) * 1000:.1f}" for key in ("first_s", "second_s")]
        cached = f"{statistics.median(data['cached_tokens']):.0f} tokens"
        rows.append([name, str(data["document_tokens"]), *medians, ratio.text(), cached, ratio.below(LIMIT)])
    results.publish(rows, ["One request at a time on an otherwise idle server; a new document each round."])


def _measure(model: Model, options: Options) -> dict[str, Any]:
    document = min(DOCUMENT_TOKENS, model.context - QUESTION_TOKENS - ANSWER_TOKENS)
    first, second, cached = [], [], []
    with start_server(model) as server:
        target = Target(url=server.url, model=served_name(server.url))
        for number in range(-1, options.repeat(7, quick=3)):
            length = document + QUESTION_TOKENS
            workload = Workload(
                input_lengths=Lengths(length, length),
                output_lengths=Lengths(ANSWER_TOKENS, ANSWER_TOKENS),
                seed=random.getrandbits(32),
                prefix_share=document / length,
            )
            run = run_async(run_load(target, workload, ClosedLoop(1), 2))
            failures = [f"{record.error} {record.detail}" for record in run.records if record.error]
            if failures:
                raise BenchmarkError(f"A question was not answered: {failures[0]}")
            if number < 0:
                continue  # the first round warms the process up
            cold, warm = (ttft(record) for record in run.records)
            first.append(cold)
            second.append(warm)
            cached.append(run.records[1].cached_tokens or 0)
            print(f"  {number:2} first {cold * 1000:9.1f} ms   second {warm * 1000:8.1f} ms", flush=True)
    return {"document_tokens": document, "first_s": first, "second_s": second, "cached_tokens": cached}


if __name__ == "__main__":
    main()
