"""What is an accepted draft worth? A proposer that is right as often as it is told to be, on the shape of TinyLlama-1.1B.

    python benchmarks/speculation_oracle.py

The model has random weights in int8 and answers greedily, so what it will say is known from a run before; the proposer tells it, with a
wrong token in between as often as wanted. A draft model of the shape of llama-68m (random weights as well) does its work beside, and what
it proposes is thrown away: so drafts cost what they would cost. Off and every fixed length in turns, in every round; `expected` is

    (1 + a + … + a^N) · T / T(N)        T: a step without drafts, T(N): a step that proposes and verifies N drafts, none of them right
"""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial
from typing import Any
from unittest.mock import patch

from common import SHAPES, Options, Results, find_model, script_options
from penstock.core.config import EngineConfig
from penstock.core.types import EngineRequest, LiveLimits, SamplingParams
from penstock.engine.engine import Engine

SHAPE, DRAFT_SHAPE = "tinyllama-1.1b", "llama-68m"
LENGTHS = (2, 4, 8)
ACCEPTANCES = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
CONCURRENCIES = (1, 8)
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 48
OFF, AUTO = "off", "auto"


class OracleEngine:
    """An engine whose proposer is an oracle with a stand-in, or with none (`setting` off)."""

    def __init__(self, options: Options, setting: str, answers: dict[tuple[int, ...], list[int]]) -> None:
        from penstock.execution.runner import worker
        from penstock.execution.speculative.oracle import OracleProposer, recorded_answers

        make_stand_in = worker.make_proposer
        self.proposers: list[OracleProposer] = []

        def make(config: EngineConfig, draft: Any, **parts: Any) -> Any:
            stand_in = make_stand_in(config, draft, **parts)
            if stand_in is None:
                return None
            vocab_size = draft.config.vocab_size
            foresight = recorded_answers(answers)
            oracle = OracleProposer(parts["batch"], foresight, acceptance=1.0, vocab_size=vocab_size, stand_in=stand_in)
            self.proposers.append(oracle)
            return oracle

        with patch.object(worker, "make_proposer", make):
            self.engine = _engine(options, setting)
        self._ids = itertools.count()

    def run(self, prompts: list[list[int]], acceptance: float) -> tuple[float, dict[tuple[int, ...], list[int]]]:
        """All prompts at once. Seconds per output token of a request, from the first tokens of all on, and the outputs."""
        for proposer in self.proposers:
            proposer.acceptance = acceptance
        sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=0)
        outputs: dict[str, list[int]] = {}
        for prompt in prompts:
            request_id = f"r{next(self._ids)}"
            outputs[request_id] = []
            self.engine.add(EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        begun, known = 0.0, 0
        while self.engine.has_work():
            for _, delta in self.engine.step():
                outputs[delta.request_id] += delta.token_ids
            if not begun and all(outputs.values()):
                begun, known = time.perf_counter(), sum(map(len, outputs.values()))
        seconds = (time.perf_counter() - begun) / (sum(map(len, outputs.values())) - known) * len(prompts)
        return seconds, {tuple(prompt): output for prompt, output in zip(prompts, outputs.values(), strict=True)}


def _engine(options: Options, setting: str) -> Engine:
    from penstock.execution.runner.executors import UniProcessExecutor
    from penstock.hub import resolve_models

    settings: dict[str, Any] = find_model(SHAPE, options).settings | {
        "quantization": "int8",
        "prefix_caching": False,
        "max_num_seqs": max(CONCURRENCIES),
        "max_num_batched_tokens": 512,
        "max_model_len": 512,
        "kv_cache_gib": 0.25,
    }
    if setting != OFF:
        drafts = 0 if setting == AUTO else int(setting)
        settings |= {"speculative_model": str(SHAPES / DRAFT_SHAPE), "num_speculative_tokens": drafts}
    folder, config = resolve_models(EngineConfig(**settings))
    executor = UniProcessExecutor(config, folder)
    resolved = executor.config
    limits = LiveLimits(
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_num_seqs=resolved.max_num_seqs,
        max_prefill_tokens_while_decoding=resolved.max_prefill_tokens_while_decoding,
    )
    return Engine(executor, limits, prefix_caching=False)


def measure(options: Options) -> dict[str, Any]:
    """Seconds per token by requests at once, acceptance and setting."""
    rounds = options.repeat(3, 1)
    acceptances = ACCEPTANCES[::3] if options.quick else ACCEPTANCES
    answers: dict[tuple[int, ...], list[int]] = {}
    settings = [OFF, *map(str, LENGTHS), AUTO]
    engines = {setting: OracleEngine(options, setting, answers) for setting in settings}
    try:
        seconds: dict[str, dict[str, dict[str, list[float]]]] = {}
        for concurrency in CONCURRENCIES:
            prompts = [
                [3 + (7 * index + 31 * place) % 4000 for place in range(PROMPT_TOKENS)] for index in range(concurrency)
            ]
            answers |= engines[OFF].run(prompts, 0.0)[1]
            by_acceptance = seconds[str(concurrency)] = {}
            for acceptance in acceptances:
                runs = by_acceptance[str(acceptance)] = {setting: [] for setting in settings}
                for number in range(rounds + 1):
                    for setting in settings[number % len(settings) :] + settings[: number % len(settings)]:
                        took, output = engines[setting].run(prompts, acceptance)
                        if any(output[tuple(prompt)] != answers[tuple(prompt)] for prompt in prompts):
                            raise RuntimeError(f"{setting} drafts changed the output")
                        if number:  # the first round warms up, and `auto` learns the acceptance
                            runs[setting].append(took)
                line = "  ".join(f"{name} {_ratio(runs, name):.2f}" for name in settings)
                print(f"  {concurrency} at once, {acceptance:.0%} right: {line}", flush=True)
    finally:
        for engine in engines.values():
            engine.engine.shutdown()
    return {"seconds": seconds}


def _ratio(runs: dict[str, list[float]], setting: str) -> float:
    """Speed beside off, the median over the rounds."""
    return statistics.median(off / took for off, took in zip(runs[OFF], runs[setting], strict=True))


def expected(by_acceptance: dict[str, dict[str, list[float]]], acceptance: float, length: int) -> float:
    """Speed beside off by the formula at the top."""
    tokens = sum(acceptance**place for place in range(length + 1))
    return tokens * _ratio(by_acceptance["0.0"], str(length))


@script_options
def main(options: Options) -> None:
    """Speed with drafts that are right as often as wanted, beside no drafts."""
    results = Results("speculation_oracle", options)
    data = results.section("int8", partial(measure, options))
    rows = [["requests", "right", *(f"N={length} (expected)" for length in LENGTHS), "auto"]]
    for concurrency, by_acceptance in data["seconds"].items():
        for acceptance, runs in by_acceptance.items():
            cells = [
                f"{_ratio(runs, str(length)):.2f} ({expected(by_acceptance, float(acceptance), length):.2f})"
                for length in LENGTHS
            ]
            rows.append([concurrency, f"{float(acceptance):.0%}", *cells, f"{_ratio(runs, AUTO):.2f}"])
    results.publish(
        rows,
        [
            "Speed beside no speculation, medians of ratios within a round; outputs were equal in every run.",
        ],
    )


if __name__ == "__main__":
    main()
