"""What does the prefix cache cost when nothing hits, and what does it bring at 90 % hits?

    python benchmarks/prefix_cache.py

Two engines in this process, one with the cache and one without, generate the same batches in turns (on off, off on, …). Every batch has
prompts that no engine has seen, except for the shared prefix of the 90 % section. The KV cache is small, so that eviction, the most
expensive part of the bookkeeping, goes on all the time. Below five rounds, and where the interval holds the limit: undecided.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from common import Model, Options, Results, find_model, script_options
from penstock.llm import LLM
from penstock.workbench.bench.compare import interleave, paired_ratio
from penstock.workbench.bench.offline import BatchRun, run_batch
from penstock.workbench.bench.workload import Lengths, Workload

COST_LIMIT = 1.03
# Prompt tokens, output tokens and requests of a batch; big shapes get smaller batches to stay within minutes. 90 % of each prompt is
# a whole number of blocks of 16 tokens, so that 90 % can hit.
BATCHES = {"stories": (480, 16, 8)}
BIG_BATCH = (480, 8, 2)
QUICK_BATCH = (160, 4, 4)


@script_options
def main(options: Options) -> None:
    """Time of a batch with the prefix cache on, divided by the time with it off, at 0 % and 90 % hits."""
    results = Results("prefix_cache", options)
    rows = [["model", "shared", "measured hits", "on/off wall (median, interval)", "on/off CPU", "claim", "holds"]]
    for name in options.choose("stories", "qwen2.5-0.5b"):
        for share in (0.0, 0.9):
            data = results.section(f"{name} {share:.0%}", partial(_measure, find_model(name, options), share, options))
            wall = paired_ratio(data["on"]["wall_s"], data["off"]["wall_s"])
            cpu = paired_ratio(data["on"]["cpu_s"], data["off"]["cpu_s"])
            limit, claim = (COST_LIMIT, "costs < 3 %") if share == 0.0 else (1.0, "faster")
            hits = f"{data['on']['hit_share']:.1%}"
            rows.append([name, f"{share:.0%}", hits, wall.text(), cpu.text(), claim, wall.below(limit)])
    results.publish(rows, ["Engines in one process, batches in turns; prompts unique but for the shared prefix."])


def _measure(model: Model, share: float, options: Options) -> dict[str, Any]:
    prompt, output, count = QUICK_BATCH if options.quick else BATCHES.get(model.name, BIG_BATCH)
    workload = Workload(
        input_lengths=Lengths(prompt, prompt),
        output_lengths=Lengths(output, output),
        seed=random.getrandbits(32),
        prefix_share=share,
    )
    # Room for three batches: after the warm-up every new batch evicts an old one.
    settings = model.settings | {
        "kv_cache_gib": min(options.kv_cache_gib, _gib_for(model, 3 * count * (prompt + output)))
    }
    runs: dict[str, list[BatchRun]] = {"on": [], "off": []}
    with LLM(**settings, prefix_caching=True) as on, LLM(**settings, prefix_caching=False) as off:
        engines = {"on": on, "off": off}
        rounds = options.repeat(21 if model.name in BATCHES else 9, quick=3)
        for number in range(-4, 0):
            for llm in engines.values():
                run_batch(llm, workload.requests(count, first=(rounds - number) * count))
        for number, which in interleave(["on", "off"], rounds):
            run = run_batch(engines[which], workload.requests(count, first=number * count))
            runs[which].append(run)
            print(f"  {number:2} {which:3} {run.wall_s:7.3f} s", flush=True)
    return {"batch": [prompt, output, count], "kv_cache_gib": settings["kv_cache_gib"]} | {
        which: {
            "wall_s": [run.wall_s for run in series],
            "cpu_s": [run.cpu_s for run in series],
            "hit_share": sum(run.cached_tokens for run in series) / sum(run.prompt_tokens for run in series),
        }
        for which, series in runs.items()
    }


def _gib_for(model: Model, tokens: int) -> float:
    """KV cache for that many tokens, by the model's own count of bytes per token."""
    with LLM(**model.settings) as probe:
        info = probe.model_info
        return tokens * info.kv_cache_bytes / info.kv_cache_tokens / 2**30


if __name__ == "__main__":
    main()
