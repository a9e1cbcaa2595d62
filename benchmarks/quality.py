"""What quantisation costs in quality, on the embedded model and text that neither training nor calibration has seen.

Each variant is what a user would run: a checkpoint made by `penstock quantize` with its defaults, or an engine setting. All go through the
engine, so the quantised kernels are what is judged. The gates are on the change of perplexity and on the share of held-out requests that
get a story about the right things (tools/stories/evaluate.py: character, moral, setting, one paragraph, ended).
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import HERE, Options, Results, script_options
from penstock import LLM, SamplingParams
from penstock.cli.main import run
from penstock.core.config import EMBEDDED_MODEL
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.workbench.evals.divergence import measure_divergence
from penstock.workbench.evals.scoring import score_windows, standard_error
from penstock.workbench.evals.texts import Window

sys.path.insert(0, str(HERE.parent / "tools" / "stories"))
from corpus import held_out, tell_story, template_request
from evaluate import MAX_NEW_TOKENS, Answer, is_story, user

# Largest drop of the share of good stories, in points.
STORY_DROP = 2.0
SEED = 7


@dataclass(frozen=True)
class Variant:
    """Something to judge. scheme: of `penstock quantize`, or "" for the embedded model itself; limit: largest change of perplexity, in
    percent; None: measured for information."""

    name: str
    limit: float | None
    scheme: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


BASE: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.25, "weight_cache": False}
FLOAT = Variant("float32", None)
VARIANTS = (
    Variant("int8 checkpoint", 0.5, scheme="int8"),
    Variant("int8 at load", 0.5, settings={"quantization": "int8"}),
    Variant("int4-awq checkpoint, group 32", 2.0, scheme="int4-awq"),
    Variant("int4-gptq checkpoint, group 32", 2.0, scheme="int4-gptq"),
    Variant("int4-rtn checkpoint, group 32", None, scheme="int4-rtn"),
    Variant("int4 at load, group 32", None, settings={"quantization": "int4"}),
    Variant("int8 KV cache", 0.2, settings={"kv_cache_dtype": "int8"}),
)


@script_options
def main(options: Options) -> None:
    """Perplexity, KL divergence and story score of every precision, against float32, on held-out text of the embedded model."""
    results = Results("quality", options)
    base = results.section(FLOAT.name, partial(measure, FLOAT, options))
    rows = [["variant", "perplexity", "change", "KL, nats", "same best token", "good stories", "gate", "holds"]]
    rows.append([FLOAT.name, f"{base['perplexity']:.4f}", "–", "–", "–", f"{base['stories']:.1%}", "–", "–"])
    failed = False
    for variant in VARIANTS:
        data = results.section(variant.name, partial(measure, variant, options))
        row, holds = judge(variant, base, data)
        rows.append(row)
        failed = failed or not holds
    notes = [
        f"{base['tokens']} tokens in {base['windows']} held-out chats; {base['requests']} held-out requests answered greedily.",
        f"Gates: change of perplexity; good stories at most {STORY_DROP:.0f} points below float32.",
        "Arithmetic and activations in float32 but for what the variant rounds. ±: one standard error of the paired difference.",
    ]
    errors = {variant.name: results.sections[variant.name]["data"].get("error") for variant in VARIANTS}
    notes += [f"{name}: {error}" for name, error in errors.items() if error]
    results.publish(rows, notes)
    if failed:
        sys.exit(1)


def judge(variant: Variant, base: dict[str, Any], data: dict[str, Any]) -> tuple[list[str], bool]:
    """The row of the table, and whether the variant keeps its gates."""
    gate = "–" if variant.limit is None else f"≤ +{variant.limit:g} %"
    if "error" in data:
        return [variant.name, *("–",) * 5, gate, "cannot run"], variant.limit is None
    drop = 100 * (base["stories"] - data["stories"])
    holds = variant.limit is None or (data["change_percent"] <= variant.limit and drop <= STORY_DROP)
    change = f"{data['change_percent']:+.2f} ± {data['change_error_percent']:.2f} %"
    quality = [
        f"{data['perplexity']:.4f}",
        change,
        f"{data['kl']:.5f}",
        f"{data['top1']:.2%}",
        f"{data['stories']:.1%}",
    ]
    return [variant.name, *quality, gate, "–" if variant.limit is None else "yes" if holds else "no"], holds


def measure(variant: Variant, options: Options) -> dict[str, Any]:
    """All figures of one variant; {"error": why} when this build cannot run it."""
    with tempfile.TemporaryDirectory(prefix="penstock-quality-") as folder:
        model = EMBEDDED_MODEL
        if variant.scheme:
            model = str(Path(folder) / "model")
            code = run(
                ["quantize", EMBEDDED_MODEL, model, "--scheme", variant.scheme, "--threads", str(options.threads)]
            )
            if code:
                raise SystemExit(code)
        try:
            settings = BASE | {"threads": options.threads} | variant.settings
            with LLM(model, **settings) as llm, LLM(**(BASE | {"threads": options.threads})) as reference:
                return _figures(llm, reference, options, is_base=variant is FLOAT)
        except (ConfigError, ModelFormatError) as error:
            print(f"  cannot run: {error}", flush=True)
            return {"error": str(error)}


def _figures(llm: LLM, reference: LLM, options: Options, *, is_base: bool) -> dict[str, Any]:
    combos = list(held_out())[: 30 if options.quick else None]
    windows = held_out_chats(reference, len(combos))
    losses, exact = (_losses(model, windows) for model in (llm, reference))
    tokens = sum(len(window) for window in losses)
    differences = [(math.fsum(ours) - math.fsum(theirs), len(ours)) for ours, theirs in zip(losses, exact, strict=True)]
    mean = math.fsum(total for total, _ in differences) / tokens
    divergence = measure_divergence(reference, llm, windows)
    if divergence.kl_divergence == 0 and not is_base:
        return {
            "error": "its predictions are exactly those of float32, so this build does not do what the setting says"
        }
    return {
        "tokens": tokens,
        "windows": len(windows),
        "requests": len(combos),
        "perplexity": math.exp(math.fsum(loss for window in losses for loss in window) / tokens),
        "change_percent": 100 * (math.exp(mean) - 1),
        "change_error_percent": 100 * math.exp(mean) * standard_error(differences, mean),
        "kl": divergence.kl_divergence,
        "top1": divergence.top1_agreement,
        "stories": story_score(llm, combos),
        "weight_bytes": llm.model_info.weight_bytes,
    }


def held_out_chats(llm: LLM, count: int) -> list[Window]:
    """Requests for held-out combinations with stories of the generator that wrote the training corpus; all tokens are scored."""
    if llm.tokenizer is None:
        raise ConfigError("The embedded model has lost its tokenizer.json; reinstall Penstock.")
    rng = random.Random(SEED)
    chats = [
        [user(template_request(combo)), {"role": "assistant", "content": tell_story(rng, combo)}]
        for combo in held_out()[:count]
    ]
    return [Window(llm.tokenizer.encode_chat(chat, add_generation_prompt=False), 1) for chat in chats]


def _losses(llm: LLM, windows: Sequence[Window]) -> list[list[float]]:
    """Negative log-likelihoods in nats, by window."""
    scored = score_windows(llm, windows)
    return [[-position.logprob for position in positions if position.logprob is not None] for positions in scored]


def story_score(llm: LLM, combos: Sequence[Any]) -> float:
    """The share of greedy answers that are what was asked for."""
    chats = [[user(template_request(combo))] for combo in combos]
    results = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS))
    good = 0
    for combo, result in zip(combos, results, strict=True):
        if result.error is not None:
            raise result.error
        good += is_story(Answer(result.outputs[0].text, result.outputs[0].finish_reason == "stop"), combo)
    return good / len(combos)


if __name__ == "__main__":
    main()
