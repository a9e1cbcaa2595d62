"""`penstock quantize MODEL OUT`: a quantised copy of a checkpoint that other tools read too, and a report of what it costs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.options import SettingsCommand
from penstock.core.config import EMBEDDED_MODEL
from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.execution.quantization.quantize import Quality, Scheme

REPORT = "penstock_quantization_report.json"

# The value of --calibration that makes the model write its own text.
SELF = "self"

# Share of the calibration text that is kept for the report when no other text is given for it.
_HELD_OUT_SHARE = 0.1

# quantize.SCHEMES, written out because importing them would import torch for `--help`; a test compares the two.
SCHEME_NAMES = ("int8", "fp8", "int4-rtn", "int4-awq", "int4-gptq")


@dataclasses.dataclass(frozen=True)
class Texts:
    """Windows of token ids for calibration and for the report, and where each came from ("" for none)."""

    calibration: list[list[int]]
    held_out: list[list[int]]
    calibration_source: str
    held_out_source: str


@click.command(cls=SettingsCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    "scheme_name",
    type=click.Choice(SCHEME_NAMES),
    required=True,
    help="int8, fp8: weights and activations in 8-bit integers or floats (fp8 is for GPUs), one scale per output feature and per token. "
    "int4-*: weights only, one scale per group, chosen by rounding to the nearest, by AWQ or by GPTQ.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Input features that share a scale (int4). Smaller is more exact, larger is smaller and faster.",
)
@click.option(
    "--calibration",
    help="Text like the one that the model will see: UTF-8 FILE, FILE.jsonl with a text per line, or 'self': the model writes it, "
    "which takes a while. The embedded model takes 'self' by itself.",
)
@click.option("--calibration-tokens", type=click.IntRange(min=256), default=32768, show_default=True, help="At most.")
@click.option("--eval-text", help="Text for the report; the last tenth of the calibration text if not given.")
@click.option("--eval-tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="At most.")
@click.option(
    "--window", type=click.IntRange(min=16), default=512, show_default=True, help="Tokens that are seen at once."
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    envvar="PENSTOCK_THREADS",
    help="CPU threads; 0 takes all cores.",
    show_default=True,
)
@click.option("--revision", help="Revision of a pulled hub model.")
@click.option("--force", is_flag=True, help="Replace the model folder OUT.")
def quantize(model: str, out: Path, scheme_name: str, group_size: str, force: bool, **values: Any) -> None:
    """Write a quantised copy of MODEL into the new folder OUT.

    The copy is a compressed-tensors checkpoint, which Penstock, vLLM and transformers read. Linear layers are quantised; embedding,
    norms and output head keep the checkpoint's precision. int4-awq and int4-gptq need calibration text.

    The report compares both models on text that was not calibrated with: perplexity, KL divergence, agreement on the best token. It
    is printed and is in OUT/penstock_quantization_report.json.
    """
    from penstock.cli.pull import ensure_model
    from penstock.execution.quantization.compressed_writer import check_target
    from penstock.execution.quantization.quantize import Scheme

    scheme = Scheme.named(scheme_name, int(group_size))
    check_target(out, force=force)
    folder = ensure_model(model, values["revision"])
    check_source(folder, out)
    check_scheme(folder, scheme)
    texts = gather_texts(model, folder, scheme, values)
    report = write_quantized(model, folder, out, scheme, texts, threads=values["threads"], force=force)
    click.echo(f"\n{report_table(report)}")
    click.echo(f"\n{out}: ready; `penstock serve {out}`")


def check_source(folder: Path, out: Path) -> None:
    """Raise ConfigError for a model that is quantised already, and for writing a model into itself."""
    if out.resolve() == folder.resolve():
        raise ConfigError(f"OUT is the model's own folder {folder}; choose another.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; only Hugging Face model folders can be quantised.")
    if json.loads((folder / "config.json").read_bytes()).get("quantization_config"):
        raise ConfigError(
            f"{folder} is quantised already (quantization_config in config.json); give the original model."
        )


def check_scheme(folder: Path, scheme: Scheme) -> None:
    """Raise ConfigError when the scheme does not fit the model, before any work is done for it."""
    from penstock.execution.models.config import ModelConfig

    config = ModelConfig.from_folder(folder)
    if config.experts is not None:
        raise ConfigError(
            f"{folder} has mixtures of experts, which `penstock quantize` cannot write; serve it with --quantization int8 or int4, which "
            "rounds the experts while they are loaded."
        )
    scheme.check_input_features(config.hidden_size, "q_proj, k_proj, v_proj, gate_proj and up_proj")
    scheme.check_input_features(config.num_heads * config.head_dim, "o_proj")
    scheme.check_input_features(config.intermediate_size, "down_proj")


def gather_texts(model: str, folder: Path, scheme: Scheme, values: dict[str, Any]) -> Texts:
    """Read or make the texts that the options ask for. Raises ConfigError when the scheme needs some and there is none."""
    from penstock.execution.quantization.calibration import split_windows
    from penstock.serving.frontend.tokenizer import Tokenizer
    from penstock.workbench.evals.texts import read_documents

    source, evaluation, window = values["calibration"], values["eval_text"], values["window"]
    if source is None and model == EMBEDDED_MODEL and (scheme.needs_calibration or evaluation is None):
        source = SELF
    if source is None and scheme.needs_calibration:
        raise ConfigError(
            f"--scheme {scheme.name} needs calibration text: give --calibration FILE, or --calibration self to have the model write it."
        )
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None and (source or evaluation):
        raise ConfigError(
            f"{folder} has no tokenizer.json, so no text can be used; add it, or leave --calibration out."
        )
    limit = values["calibration_tokens"]
    calibration: list[list[int]] = []
    if source == SELF:
        from penstock.cli.self_calibration import write_samples

        samples = write_samples(folder, limit, threads=values["threads"], progress=sys.stderr.isatty())
        calibration = split_windows(samples, window, limit)
    elif source is not None and tokenizer is not None:
        calibration = split_windows(
            [tokenizer.encode(text) for text in read_documents(source, "--calibration")], window, limit
        )
    held_out: list[list[int]] = []
    if evaluation is not None and tokenizer is not None:
        documents = [tokenizer.encode(text) for text in read_documents(evaluation, "--eval-text")]
        held_out = split_windows(documents, window, values["eval_tokens"])
    elif calibration:
        calibration, held_out = hold_out(calibration, values["eval_tokens"])
    if scheme.needs_calibration and not calibration:
        raise ConfigError("--calibration is too short: one window of text is the least; give a longer text.")
    return Texts(calibration, held_out, source or "", evaluation or (f"held out of {source}" if held_out else ""))


def hold_out(windows: Sequence[list[int]], limit: int) -> tuple[list[list[int]], list[list[int]]]:
    """The windows without the last tenth (but one window at least), and that tenth, at most `limit` tokens of it."""
    from penstock.execution.quantization.calibration import split_windows

    count = max(1, round(len(windows) * _HELD_OUT_SHARE))
    longest = max(map(len, windows))
    return list(windows[:-count]), split_windows(windows[-count:], longest, limit)


def write_quantized(
    model: str, folder: Path, out: Path, scheme: Scheme, texts: Texts, *, threads: int = 0, force: bool = False
) -> dict[str, Any]:
    """Quantise the model in `folder` into `out`; the report. Nothing is left of `out` when it fails."""
    import torch

    from penstock.execution.layers.rotary import RotaryEmbedding
    from penstock.execution.models.config import ModelConfig
    from penstock.execution.quantization.compressed_writer import CompressedWriter, SafetensorsReader, new_folder
    from penstock.execution.quantization.quantize import quantize_checkpoint

    if threads:
        torch.set_num_threads(threads)
    config = ModelConfig.from_folder(folder)
    reader = SafetensorsReader(folder)
    rotary = RotaryEmbedding(config.rope, config.head_dim, torch.float32, torch.device("cpu"))
    with new_folder(out, force=force) as draft:
        writer = CompressedWriter(draft)
        started = time.perf_counter()
        quality = quantize_checkpoint(
            reader,
            writer,
            config,
            rotary,
            scheme,
            calibration=texts.calibration,
            held_out=texts.held_out,
            progress=sys.stderr.isatty(),
        )
        writer.finish(folder, scheme)
        seconds = time.perf_counter() - started
        sizes = (reader.nbytes, sum(file.stat().st_size for file in draft.glob("*.safetensors")))
        report = make_report(model, scheme, texts, quality, sizes, seconds)
        (draft / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def make_report(
    model: str, scheme: Scheme, texts: Texts, quality: Quality | None, sizes: tuple[int, int], seconds: float
) -> dict[str, Any]:
    """What the JSON file holds; sizes: bytes of the weight files before and after."""
    import msgspec

    from penstock.workbench.bench.environment import describe_environment

    return {
        "schema": 1,
        "model": model,
        "scheme": scheme.name,
        "group_size": scheme.group_size,
        "head": "as in the checkpoint",
        "calibration": {"source": texts.calibration_source, "tokens": sum(map(len, texts.calibration))}
        if scheme.needs_calibration
        else None,
        "evaluation": {"source": texts.held_out_source, "tokens": sum(map(len, texts.held_out))} if quality else None,
        "quality": dataclasses.asdict(quality) if quality else None,
        "weight_bytes": {"before": sizes[0], "after": sizes[1]},
        "seconds": round(seconds, 1),
        "environment": msgspec.to_builtins(describe_environment()),
    }


def report_table(report: dict[str, Any]) -> str:
    """The report for people."""
    from penstock.workbench.bench.report import align

    before, after = report["weight_bytes"]["before"], report["weight_bytes"]["after"]
    rows = [["", "before", "after", "change"]]
    rows.append(["weight files, MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before - 1:+.1%}"])
    quality = report["quality"]
    notes = [f"{report['scheme']}, {report['seconds']:.1f} s"]
    if quality is None:
        notes.append("No text to compare the two models on: give --eval-text FILE for perplexity and KL divergence.")
    else:
        change = quality["perplexity_after"] / quality["perplexity_before"] - 1
        exact, rounded = (f"{quality[f'perplexity_{when}']:.4f}" for when in ("before", "after"))
        rows.append(["perplexity", exact, rounded, f"{change:+.2%}"])
        rows.append(["KL divergence, nats", "0", f"{quality['kl_divergence']:.6f}", ""])
        rows.append(["same best token", "100.00%", f"{quality['top1_agreement']:.2%}", ""])
        notes.append(f"Compared on {quality['tokens']} tokens: {report['evaluation']['source']}.")
    return "\n".join([align(rows), "", *notes])
