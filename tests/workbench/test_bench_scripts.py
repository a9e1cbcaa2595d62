"""What the scripts in benchmarks/ rest on: shapes that are those models, flags that `penstock serve` takes, sections that are not lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.common import SHAPES, Options, Results, find_model, flags
from click import UsageError

from penstock.core.config import EngineConfig

# Parameters of the published checkpoints.
PARAMETERS = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-68m": 68_030_208,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
}


def options(out: Path, **changes: Any) -> Options:
    settings: dict[str, Any] = {
        "quick": False,
        "fresh": False,
        "out": out,
        "models": (),
        "rounds": None,
        "threads": 1,
        "kv_cache_gib": 0.5,
    }
    return Options(**(settings | changes))


def count_parameters(config: dict[str, Any]) -> int:
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    if config["model_type"] == "qwen2":
        attention += head_dim * (heads + 2 * kv_heads)
    if config["model_type"] == "qwen3":
        attention += 2 * head_dim
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return int(config["num_hidden_layers"] * layer + embeddings + hidden)


def test_every_shape_has_the_parameters_of_its_checkpoint() -> None:
    configs = {path.name: json.loads((path / "config.json").read_text()) for path in SHAPES.iterdir()}
    assert {name: count_parameters(config) for name, config in configs.items()} == PARAMETERS


def test_a_shape_becomes_a_server_with_dummy_weights(tmp_path: Path) -> None:
    model = find_model("qwen2.5-0.5b", options(tmp_path))
    command = model.serve_command(prefix_caching=False, max_num_seqs=8)
    serve = command.index("serve")
    assert command[serve + 1] == str(SHAPES / "qwen2.5-0.5b")
    given = command[serve + 2 :]
    assert given[given.index("--load-format") + 1] == "dummy"
    assert given[given.index("--max-num-seqs") + 1] == "8"
    assert given[given.index("--max-model-len") + 1] == str(model.context) == "4096"
    assert "--no-prefix-caching" in given
    assert EngineConfig(**model.settings).load_format == "dummy"


def test_flags() -> None:
    assert flags({"a_b": True, "c": False, "d_e": 0.5}) == ["--a-b", "--no-c", "--d-e", "0.5"]


def test_unknown_model_names_the_shapes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tinyllama-1\.1b"):
        find_model("gpt-5", options(tmp_path))


def test_finished_sections_are_not_measured_again(tmp_path: Path) -> None:
    first = Results("demo", options(tmp_path))
    assert first.section("a", lambda: {"value": 1}) == {"value": 1}
    with pytest.raises(KeyboardInterrupt):
        first.section("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    second = Results("demo", options(tmp_path))
    assert second.section("a", lambda: {"value": 2}) == {"value": 1}
    assert second.section("b", lambda: {"value": 3}) == {"value": 3}
    again = Results("demo", options(tmp_path, fresh=True))
    assert again.section("a", lambda: {"value": 4}) == {"value": 4}


def test_results_are_json_with_machine_and_a_markdown_table(tmp_path: Path) -> None:
    results = Results("demo", options(tmp_path, quick=True))
    results.section("a", lambda: {"value": 1})
    results.publish([["model", "ms"], ["x", "1"]], ["A note."])
    stored = json.loads((tmp_path / "demo-quick.json").read_text())
    assert stored["sections"]["a"]["data"] == {"value": 1}
    assert stored["sections"]["a"]["environment"]["cores"] >= 1
    text = (tmp_path / "demo-quick.md").read_text()
    assert text.startswith("| model | ms |\n|---|---:|\n| x | 1 |\n\nA note.\nMachine: ")


def test_choosing_models_and_rounds(tmp_path: Path) -> None:
    assert options(tmp_path).choose("a", "b") == ["a", "b"]
    assert options(tmp_path, quick=True).choose("a", "b") == ["stories"]
    assert options(tmp_path, quick=True, models=("c",)).choose("a") == ["c"]
    assert (options(tmp_path).repeat(7, 2), options(tmp_path, quick=True).repeat(7, 2)) == (7, 2)
    assert options(tmp_path, rounds=9, quick=True).repeat(7, 2) == 9
