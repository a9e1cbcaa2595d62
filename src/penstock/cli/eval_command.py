"""`penstock eval perplexity | divergence`: how good a model's predictions are, measured through the engine that would serve it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.options import SettingsCommand, config_from, with_settings
from penstock.core.config import EMBEDDED_MODEL, EngineConfig
from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.llm import LLM
    from penstock.workbench.evals.texts import Window

# Settings for which a result would be meaningless, or which have no effect here.
_WITHOUT = frozenset({"load_format", "seed"})


@click.group()
def evaluate() -> None:
    """Measure the quality of a model's predictions on a text.

    The engine itself computes them: --quantization, --kv-cache-dtype, --dtype and all its other settings count.
    """


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what text is scored, and how it is cut into windows."""
    options = [
        click.option("--text", required=True, help="UTF-8 text, FILE.jsonl with a text per line, or - for stdin."),
        click.option(
            "--window", type=click.IntRange(min=2), help="Tokens that the model sees at once.  [default: 512]"
        ),
        click.option(
            "--stride", type=click.IntRange(min=1), help="Tokens scored per window.  [default: half of the window]"
        ),
        click.option("--limit-tokens", type=click.IntRange(min=2), help="Take only that many tokens of the text."),
        click.option("--json", "as_json", is_flag=True, help="Print a JSON object."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@evaluate.command(cls=SettingsCommand)
@click.argument("model", default=EMBEDDED_MODEL, envvar="PENSTOCK_MODEL")
@text_options
@with_settings(EngineConfig, without=_WITHOUT)
def perplexity(
    text: str, window: int | None, stride: int | None, limit_tokens: int | None, as_json: bool, **values: Any
) -> None:
    """Perplexity of a text under MODEL.

    The text is cut into windows of --window tokens that overlap, so that each token is scored once: --stride new ones per window, behind as
    much context as fits. Windows begin with the BOS token where the tokenizer writes one. A longer window gives a lower perplexity:
    compare only figures with the same window, stride and tokenizer.
    """
    from penstock.workbench.evals.perplexity import measure_perplexity

    config = config_from(EngineConfig, values)
    with _open(config) as llm:
        windows = _windows(llm, text, window, stride, limit_tokens)
        result = measure_perplexity(llm, windows, progress=sys.stderr.isatty())
        precision = _precision(config, llm)
    if as_json:
        click.echo(_json({"model": config.model, **precision, **dataclasses.asdict(result)}))
        return
    click.echo(
        f"model        {config.model}: {', '.join(f'{name} {value}' for name, value in precision.items() if value)}"
    )
    click.echo(f"tokens       {result.tokens} scored in {result.windows} windows")
    click.echo(f"nll/token    {result.nll_per_token:.4f} nats")
    click.echo(f"perplexity   {result.perplexity:.4f} ± {result.standard_error:.4f}")
    click.echo(f"speed        {result.tokens_per_second:.1f} tokens/s, {result.seconds:.1f} s")


@evaluate.command(cls=SettingsCommand)
@click.argument("model", default=EMBEDDED_MODEL, envvar="PENSTOCK_MODEL")
@click.option("--reference", required=True, help="The model that MODEL should behave like.")
@text_options
@with_settings(EngineConfig, without=_WITHOUT)
def divergence(
    reference: str,
    text: str,
    window: int | None,
    stride: int | None,
    limit_tokens: int | None,
    as_json: bool,
    **values: Any,
) -> None:
    """KL divergence of MODEL from a reference model on a text, and how often their best tokens agree.

    Both need the same tokenizer. The engine's settings are MODEL's; the reference computes in float32 with the weights of its
    checkpoint. The divergence is taken over the 20 most likely tokens: a lower bound, close where little probability is left over.
    """
    from penstock.workbench.evals.divergence import measure_divergence

    config = config_from(EngineConfig, values)
    plain = EngineConfig(model=reference, dtype="float32", max_model_len=config.max_model_len, threads=config.threads)
    with _open(config) as llm, _open(plain) as other:
        hashes = [tokenizer.tokenizer_hash for tokenizer in (llm.tokenizer, other.tokenizer) if tokenizer is not None]
        if len(set(hashes)) > 1:
            raise ConfigError(
                f"{config.model} and --reference {reference} have different tokenizers; they need the same."
            )
        windows = _windows(llm, text, window, stride, limit_tokens)
        result = measure_divergence(other, llm, windows, progress=sys.stderr.isatty())
    if as_json:
        click.echo(_json({"model": config.model, "reference": reference, **dataclasses.asdict(result)}))
        return
    click.echo(f"tokens          {result.tokens} scored in {len(windows)} windows")
    click.echo(f"KL divergence   {result.kl_divergence:.6f} ± {result.standard_error:.6f} nats/token")
    click.echo(f"same best token {result.top1_agreement:.2%}")


def _open(config: EngineConfig) -> LLM:
    from penstock.cli.pull import ensure_model
    from penstock.llm import LLM

    ensure_model(config.model, config.revision)
    settings: dict[str, Any] = dataclasses.asdict(config)
    return LLM(**settings)


def _windows(llm: LLM, text: str, window: int | None, stride: int | None, limit: int | None) -> list[Window]:
    """The text's windows. Raises ConfigError for sizes that do not fit each other or the model."""
    from penstock.workbench.evals.texts import read_documents, split_document

    if llm.tokenizer is None:
        raise ConfigError("This model has no tokenizer.json, so a text cannot be scored; add it to the model folder.")
    longest = llm.model_info.max_request_tokens or llm.model_info.max_model_len
    if window is None:
        window = min(512, longest)
    if window > longest:
        raise ConfigError(
            f"--window {window} is longer than the {longest} tokens that one request can have here; lower it."
        )
    if stride is None:
        stride = max(window // 2, 1)
    if stride >= window:
        raise ConfigError(f"--stride {stride} must be below --window {window}; the first token of a window is context.")
    windows: list[Window] = []
    for document in read_documents(text, "--text"):
        token_ids = llm.tokenizer.encode(document)
        if limit is not None:
            token_ids = token_ids[:limit]
            limit -= len(token_ids)
        bos = llm.tokenizer.bos_token_id
        windows += split_document(token_ids, window, stride, bos if token_ids[:1] == [bos] else None)
    return windows


def _precision(config: EngineConfig, llm: LLM) -> dict[str, str]:
    """What decides about the figure besides the model."""
    info = llm.model_info
    return {
        "dtype": info.dtype,
        "weights": info.weights or config.quantization,
        "kv_cache": info.kv_cache_dtype or config.kv_cache_dtype,
        "attention": info.attention_backend,
        "kernels": info.kernels,
    }


def _json(values: dict[str, Any]) -> str:
    """JSON has no NaN; a figure that does not exist is null."""
    clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
    return json.dumps(clean, indent=2)
