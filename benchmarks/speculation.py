"""Does speculative decoding pay, and does `auto` know when? By number of requests at once, beside no speculation and fixed lengths.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --only draft --rounds 9

All engines of a comparison live in this process and run in turns, one after the other in every round, each closed-loop with so many
requests at once: a request that ends is replaced by the next. No prefix cache, so that every request is computed whole by everybody.
Ratios are taken within a round; the table has their medians, and the interquartile range of `auto`.

    draft    the embedded model with its draft model, on stories
    ngram    the same model with n-grams, on requests that quote: the story that is asked for stands in the conversation already
    fresh    n-grams where there is nothing to quote, the worst case of `auto`

The plot (with matplotlib installed) answers "speculation or batching?": tokens per second of the machine against tokens per second of one
request, for every number of requests at once.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from common import RESULTS, Options, Results, find_model
from penstock.core.config import EngineConfig
from penstock.core.types import EngineRequest, SamplingParams
from penstock.engine.engine import Engine
from speculation_plot import draw

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 3, 4, 6, 8)
OFF, AUTO = "off", "auto"
MAX_REQUESTS = 64
OUTPUT_TOKENS = 96
HEROES = ("fox", "rabbit", "bear", "owl", "mouse", "deer", "hedgehog", "squirrel")
MORALS = ("honesty", "patience", "kindness", "courage", "sharing", "hard work", "gratitude", "forgiveness")
PLACES = (
    "a forest",
    "a garden",
    "a village",
    "a meadow",
    "a mountain valley",
    "a seaside town",
    "a farm",
    "a city park",
)

Prompt = list[int]


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's closed-loop run. request_seconds: per output token of each request, from its submission to its end."""

    seconds: float
    tokens: int
    steps: int
    drafts: int
    accepted: int
    seconds_per_token: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Runner:
    """An engine in this process, driven without HTTP."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()

    def run(self, prompts: Sequence[Prompt], sampling: SamplingParams, concurrency: int) -> Run:
        """Answer all prompts, `concurrency` at a time."""
        engine, waiting = self.engine, iter(prompts)
        begun: dict[str, float] = {}
        tokens: dict[str, int] = {}
        per_token: list[float] = []
        before, started = engine.stats(), time.perf_counter()
        while True:
            for prompt in itertools.islice(waiting, concurrency - len(begun)):
                request = EngineRequest(request_id=f"run-{next(self._ids)}", prompt_token_ids=prompt, sampling=sampling)
                begun[request.request_id], tokens[request.request_id] = time.perf_counter(), 0
                engine.add(request)
            if not begun:
                break
            for _, delta in engine.step():
                tokens[delta.request_id] += len(delta.token_ids)
                if delta.error is not None:
                    raise RuntimeError(f"a request failed: {delta.error}")
                if delta.finish_reason is not None:
                    seconds = time.perf_counter() - begun.pop(delta.request_id)
                    per_token.append(seconds / max(1, tokens[delta.request_id]))
        seconds, after = time.perf_counter() - started, engine.stats()
        return Run(
            seconds,
            sum(tokens.values()),
            after.steps - before.steps,
            after.draft_tokens - before.draft_tokens,
            after.accepted_draft_tokens - before.accepted_draft_tokens,
            per_token,
        )

    def close(self) -> None:
        self.engine.shutdown()


def engine_for(options: Options, name: str, proposer: str, setting: str, **more: Any) -> Runner:
    """An engine with `setting`: off, auto, or a number of drafts."""
    from penstock.hub import resolve_models
    from penstock.launch import build_engine

    settings: dict[str, Any] = find_model(name, options).settings | {
        "prefix_caching": False,
        "max_num_seqs": MAX_REQUESTS,
        "max_num_batched_tokens": 1024,
        **more,
    }
    if setting != OFF:
        settings |= {"speculative_model": proposer, "num_speculative_tokens": 0 if setting == AUTO else int(setting)}
    folder, config = resolve_models(EngineConfig(**settings))
    return Runner(build_engine(config, folder)[0])


# ---- workloads of the embedded model ----


def story_prompts() -> list[Prompt]:
    """64 chats that ask for a story each, as token ids."""
    return [_encode([_ask(hero, moral)]) for hero, moral in itertools.product(HEROES, MORALS)]


def quoting_prompts(runner: Runner) -> list[Prompt]:
    """The same chats, each asked for the second time after its answer: about half of the answers repeat long parts of the first."""
    tokenizer = _tokenizer()
    prompts = []
    for hero, moral in itertools.product(HEROES, MORALS):
        question = _ask(hero, moral)
        first = _answer(runner, _encode([question]))
        text = tokenizer.decode(first)
        prompts.append(_encode([question, {"role": "assistant", "content": text}, question]))
    return prompts


def _ask(hero: str, moral: str) -> dict[str, str]:
    place = PLACES[(HEROES.index(hero) + MORALS.index(moral)) % len(PLACES)]
    text = (
        f"Write a single paragraph moral story for children about a {hero} who learns the value of {moral} in {place}."
    )
    return {"role": "user", "content": text}


def _tokenizer() -> Any:
    from penstock.hub import resolve_model
    from penstock.serving.frontend.tokenizer import Tokenizer

    return Tokenizer.from_folder(resolve_model("stories"))


def _encode(messages: list[dict[str, str]]) -> Prompt:
    encoded: Prompt = _tokenizer().encode_chat(messages)
    return encoded


def _answer(runner: Runner, prompt: Prompt) -> list[int]:
    output: list[int] = []
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, seed=0)
    runner.engine.add(EngineRequest(request_id=f"first-{id(prompt)}", prompt_token_ids=prompt, sampling=sampling))
    while runner.engine.has_work():
        for _, delta in runner.engine.step():
            output += delta.token_ids
    return output


# ---- measuring ----


def compare(
    runners: dict[str, Runner],
    prompts: list[Prompt],
    sampling: SamplingParams,
    concurrencies: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    """Every engine at every number of requests, in turns. `setting → concurrency → list of runs`."""
    result: dict[str, Any] = {name: {} for name in runners}
    for runner in runners.values():
        runner.run(prompts[:16], sampling, 8)
    for concurrency in concurrencies:
        count = max(6, min(2 * concurrency, len(prompts))) if concurrency < 64 else len(prompts)
        runs: dict[str, list[Run]] = {name: [] for name in runners}
        names = list(runners)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                runs[name].append(runners[name].run(prompts[:count], sampling, concurrency))
        for name in names:
            result[name][str(concurrency)] = _summary(runs[name], runs[OFF])
        line = "  ".join(f"{name} {result[name][str(concurrency)]['ratio']:.2f}" for name in names)
        print(f"  {concurrency} at once: {line}", flush=True)
    return result


def _summary(runs: list[Run], plain: list[Run]) -> dict[str, Any]:
    ratios = [run.tokens_per_second / other.tokens_per_second for run, other in zip(runs, plain, strict=True)]
    drafts, accepted = sum(run.drafts for run in runs), sum(run.accepted for run in runs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "request_tokens_per_second": 1 / statistics.median(itertools.chain(*(run.seconds_per_token for run in runs))),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "ratios": ratios,
        "tokens_per_step": sum(run.tokens for run in runs) / sum(run.steps for run in runs),
        "drafts": drafts,
        "acceptance": accepted / drafts if drafts else 0.0,
    }


def measure_pair(options: Options, proposer: str, workload: str, temperature: float) -> dict[str, Any]:
    """The embedded model: off, every length, auto."""
    lengths = LENGTHS[1:4:2] if options.quick else LENGTHS
    settings = [OFF, *(str(length) for length in lengths), AUTO]
    runners = {setting: engine_for(options, "stories", proposer, setting) for setting in settings}
    try:
        prompts = quoting_prompts(runners[OFF]) if workload == "quotes" else story_prompts()
        sampling = SamplingParams(temperature=temperature, max_tokens=OUTPUT_TOKENS, seed=7)
        concurrencies = CONCURRENCIES[::3] if options.quick else CONCURRENCIES
        return compare(runners, prompts, sampling, concurrencies, options.repeat(7, 2))
    finally:
        for runner in runners.values():
            runner.close()


def pair_rows(name: str, data: dict[str, Any]) -> list[list[str]]:
    """A row for each number of requests at once."""
    rows = []
    for concurrency in data[OFF]:
        fixed = {setting: data[setting][concurrency] for setting in data if setting not in (OFF, AUTO)}
        best = max(fixed, key=lambda setting: fixed[setting]["ratio"])
        auto = data[AUTO][concurrency]
        beside = [a / b for a, b in zip(auto["ratios"], fixed[best]["ratios"], strict=True)]
        rows.append(
            [
                name,
                concurrency,
                f"{data[OFF][concurrency]['tokens_per_second']:,.0f}",
                f"{fixed[best]['ratio']:.2f} (N={best})",
                f"{auto['ratio']:.2f} ({auto['ratio_low']:.2f}–{auto['ratio_high']:.2f})",
                f"{statistics.median(beside):.2f}",
                f"{auto['acceptance']:.0%} of {auto['drafts']:,}" if auto["drafts"] else "–",
                f"{fixed[best]['acceptance']:.0%}",
            ]
        )
    return rows


HEADER = [
    "workload",
    "requests",
    "off, tokens/s",
    "best fixed / off",
    "auto / off",
    "auto / best",
    "auto accepted",
    "fixed accepted",
]
SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "draft": partial(measure_pair, proposer="stories-draft", workload="stories", temperature=0.0),
    "draft, temperature 0.8": partial(measure_pair, proposer="stories-draft", workload="stories", temperature=0.8),
    "ngram": partial(measure_pair, proposer="ngram", workload="quotes", temperature=0.0),
    "fresh": partial(measure_pair, proposer="ngram", workload="stories", temperature=0.0),
}


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A smoke run; decides nothing.")
@click.option("--fresh", is_flag=True, help="Measure finished sections again.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved repetitions.")
@click.option("--threads", default=0, show_default=True, help="CPU threads of the engines; 0: all cores.")
@click.option("--kv-cache-gib", default=0.1, show_default=True, help="KV cache of each engine.")
@click.option("--only", type=click.Choice([*SECTIONS]), multiple=True, help="Sections to measure.")
def main(only: tuple[str, ...], **values: Any) -> None:
    options = Options(models=(), **values)
    results = Results("speculation", options)
    rows = [HEADER]
    for name, measure in SECTIONS.items():
        if not only or name in only or name in results.sections:
            rows += pair_rows(name, results.section(name, partial(measure, options)))
    results.publish(rows, [__doc__.split("\n\n")[2].replace("\n", " ")])
    draw(results.sections, results.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
