"""`penstock quantize` and `penstock eval`, from the command line to the files and figures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cli.quantize import REPORT, SCHEME_NAMES, hold_out
from penstock.cli.self_calibration import write_samples
from penstock.execution.quantization.quantize import SCHEMES
from penstock.testing.checkpoints import write_tiny_checkpoint
from tests.cli.conftest import Invoke

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands set the number of threads of this process; small tensors gain nothing from more than one."""
    monkeypatch.setenv("PENSTOCK_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", tokenizer=True, dtype="bfloat16")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_the_command_knows_all_schemes() -> None:
    assert SCHEME_NAMES == SCHEMES


def test_quantize_writes_a_folder_and_a_report(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--scheme", "int4-gptq", "--calibration", str(text), "--window", "64")
    result = invoke("quantize", str(model), str(out), *arguments)
    assert result.code == 0, result.err
    report = json.loads((out / REPORT).read_text())
    assert (report["scheme"], report["group_size"], report["head"]) == ("int4-gptq", 32, "as in the checkpoint")
    windows = len(TEXT) // 64 + 1
    assert report["evaluation"] == {"source": f"held out of {text}", "tokens": 3 * 64 + len(TEXT) % 64}
    assert report["calibration"] == {"source": str(text), "tokens": 64 * (windows - 4)}
    sizes = report["weight_bytes"]
    assert sizes["before"] == (model / "model.safetensors").stat().st_size
    assert sizes["after"] == (out / "model.safetensors").stat().st_size < sizes["before"]
    quality = report["quality"]
    assert quality["kl_divergence"] > 0
    assert f"{quality['perplexity_before']:.4f}" in result.out
    assert f"{quality['top1_agreement']:.2%}" in result.out
    assert f"penstock serve {out}" in result.out
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


def test_schemes_without_calibration_need_no_text(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    result = invoke("quantize", str(model), str(tmp_path / "out"), "--scheme", "int8")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert (report["quality"], report["calibration"], report["evaluation"]) == (None, None, None)
    assert "give --eval-text FILE" in result.out


def test_a_text_for_the_report_alone(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--scheme", "int8", "--eval-text", str(text), "--eval-tokens", "100", "--window", "32")
    result = invoke("quantize", str(model), str(tmp_path / "out"), *arguments)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["evaluation"] == {"source": str(text), "tokens": 100}
    assert report["quality"]["tokens"] == 100 - 4
    assert 0 < report["quality"]["kl_divergence"] < 0.01


def test_the_model_can_write_its_own_calibration_text(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    arguments = ("--scheme", "int4-awq", "--calibration", "self", "--calibration-tokens", "2000")
    result = invoke("quantize", str(model), str(tmp_path / "out"), *arguments)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["calibration"]["source"] == "self"
    assert 1500 < report["calibration"]["tokens"] + report["evaluation"]["tokens"] <= 2000


def test_samples_are_the_same_every_time(model: Path) -> None:
    first, second = (write_samples(model, 1200, threads=1) for _ in range(2))
    assert first == second
    assert len({tuple(sample) for sample in first}) > len(first) // 2
    assert sum(map(len, first)) >= 1200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "int4-gptq"), "--scheme int4-gptq needs calibration text: give --calibration FILE"),
        (("--scheme", "int4-rtn", "--group-size", "128"), "does not divide the 64 input features"),
        (("--scheme", "int4-awq", "--calibration", "absent.txt"), "--calibration absent.txt cannot be read"),
        (("--scheme", "int8", "--eval-text", "absent.txt"), "--eval-text absent.txt cannot be read"),
        (("--scheme", "int9"), "--scheme"),
    ],
)
def test_wrong_options(invoke: Invoke, model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("quantize", str(model), str(tmp_path / "out"), *arguments)
    assert result.code == 2
    assert message in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_nothing_is_overwritten_or_quantised_twice(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("quantize", str(model), str(out), "--scheme", "int8").code == 0
    again = invoke("quantize", str(model), str(out), "--scheme", "int4-rtn")
    assert again.code == 2
    assert "--force" in again.err
    assert invoke("quantize", str(model), str(out), "--scheme", "int4-rtn", "--force").code == 0
    assert json.loads((out / REPORT).read_text())["scheme"] == "int4-rtn"
    twice = invoke("quantize", str(out), str(tmp_path / "twice"), "--scheme", "int8")
    assert "quantised already" in twice.err
    itself = invoke("quantize", str(model), str(model), "--scheme", "int8", "--force")
    assert "own folder" in itself.err
    assert (model / "model.safetensors").is_file()


def test_text_that_is_too_short_to_calibrate_and_to_hold_out(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    arguments = ("--scheme", "int4-awq", "--calibration", str(tmp_path / "short.txt"))
    result = invoke("quantize", str(model), str(tmp_path / "out"), *arguments)
    assert result.code == 2
    assert "too short" in result.err


def test_the_last_tenth_is_held_out() -> None:
    windows = [[i] * 10 for i in range(30)]
    assert hold_out(windows, 1000) == (windows[:27], windows[27:])
    assert hold_out(windows, 15) == (windows[:27], [[27] * 10, [28] * 5])
    assert hold_out(windows[:2], 1000) == (windows[:1], windows[1:2])


# ---- penstock eval ----


def eval_json(invoke: Invoke, *arguments: str) -> dict[str, Any]:
    result = invoke("eval", *arguments, "--json")
    assert result.code == 0, result.err
    values: dict[str, Any] = json.loads(result.out)
    return values


def direct_perplexity(model: Path, token_ids: list[int]) -> float:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        logits = reference(ids).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp())


def test_perplexity_of_one_window_is_that_of_transformers(invoke: Invoke, model: Path, text: Path) -> None:
    arguments = ("perplexity", str(model), "--text", str(text), "--limit-tokens", "100", "--dtype", "float32")
    values = eval_json(invoke, *arguments)
    assert (values["tokens"], values["windows"], values["dtype"]) == (99, 1, "float32")
    assert values["perplexity"] == pytest.approx(direct_perplexity(model, list(TEXT[:100].encode())), rel=1e-4)
    assert values["standard_error"] > 0
    assert values["nll_per_token"] == pytest.approx(math.log(values["perplexity"]))


def test_perplexity_for_people(invoke: Invoke, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("eval", "perplexity", str(model), "--text", str(text), "--window", "64", "--limit-tokens", "300")
    assert result.code == 0, result.err
    assert "299 scored in 9 windows" in result.out
    assert "perplexity" in result.out
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT[:40]))
    assert "39 scored in 1 windows" in invoke("eval", "perplexity", str(model), "--text", "-").out


def test_divergence_from_itself_and_from_another(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    common = ("--text", str(text), "--limit-tokens", "200", "--dtype", "float32")
    other = write_tiny_checkpoint(tmp_path / "other", tokenizer=True, seed=1)
    far = eval_json(invoke, "divergence", str(other), "--reference", str(model), *common)
    assert far["kl_divergence"] > 0.003
    assert far["top1_agreement"] < 0.5
    near = eval_json(invoke, "divergence", str(other), "--reference", str(other), *common)
    assert near["kl_divergence"] < 1e-6
    assert near["top1_agreement"] == 1.0
    assert near["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "64", "--stride", "64"), "--stride 64 must be below --window 64"),
        (("--window", "100000"), "--window 100000 is longer than"),
        (("--text", "absent.txt"), "--text absent.txt cannot be read"),
    ],
)
def test_wrong_eval_options(invoke: Invoke, model: Path, text: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("eval", "perplexity", str(model), "--text", str(text), *arguments)
    assert result.code == 2
    assert message in result.err


def test_models_without_a_tokenizer_or_with_different_ones(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    bare = write_tiny_checkpoint(tmp_path / "bare")
    result = invoke("eval", "perplexity", str(bare), "--text", str(text))
    assert "no tokenizer.json" in result.err
    result = invoke("quantize", str(bare), str(tmp_path / "out"), "--scheme", "int8", "--eval-text", str(text))
    assert "no tokenizer.json" in result.err
    result = invoke("eval", "divergence", str(model), "--reference", "stories", "--text", str(text))
    assert "different tokenizers" in result.err
