"""benchmarks/cpu/compare: what rows measure and against which ceiling, checkpoints, workers that fail, tables that do not flatter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.cpu import measure as measure_module
from benchmarks.cpu.budget import Ceilings, Shape
from benchmarks.cpu.checkpoints import SHAPES, Checkpoints, letter_tokenizer, tensor_shapes
from benchmarks.cpu.compare import default_kv_cache_dtype
from benchmarks.cpu.engines import PRECISIONS, Conditions, Setup, setups
from benchmarks.cpu.measure import Bench, measure
from benchmarks.cpu.peers import PEERS, Found, Peer, find
from benchmarks.cpu.plot import relative
from benchmarks.cpu.report import ceilings_text, notes, row_ceiling, shape_table
from benchmarks.cpu.rows import QUICK_ROWS, ROWS, Row
from benchmarks.cpu.worker import Worker
from tokenizers import Tokenizer

from penstock.workbench.bench.load import BenchmarkError

CONDITIONS = Conditions(threads=1, kv_cache_dtype="float32", kv_tokens=512, max_num_seqs=4, max_model_len=256)
PARAMETERS = {"tinyllama-1.1b": 1_100_048_384, "qwen2.5-0.5b": 494_032_768}
ENGINE = """
import sys
sys.path.insert(0, {adapters!r})
import protocol

class Engine:
    versions = {{"fake": "1"}}
    notes = ""
    def __init__(self, settings):
        if settings["fail"] == "load":
            raise ValueError("no such model")
        print("engines print what they like")
        self.short = settings["fail"] == "short"
    def prepare(self, requests, tokens):
        pass
    def generate(self, prompts, output_tokens):
        return [output_tokens - self.short] * len(prompts)

protocol.serve(Engine)
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An engine of a few lines that speaks the adapters' protocol."""
    path = tmp_path / "fake_engine.py"
    adapters = Path(measure_module.__file__).with_name("adapters")
    path.write_text(ENGINE.format(adapters=str(adapters)))
    return path


def worker(adapter: Path) -> Worker:
    return Worker(Path(sys.executable), adapter, {}, adapter.with_suffix(".log"))


def test_a_worker_answers_and_says_why_it_cannot(adapter: Path) -> None:
    with worker(adapter) as engine:
        assert engine.ask("load", settings={"fail": ""})["versions"] == {"fake": "1"}
        answer = engine.ask("generate", prompts=[[1], [2]], output_tokens=3)
        assert answer["tokens"] == [3, 3]
        assert answer["seconds"] >= 0
        engine.reset_peak()
        assert engine.peak_bytes() > 1_000_000
        assert engine.cpu_seconds() > 0
        with pytest.raises(BenchmarkError, match="'dance' is not possible"):
            engine.ask("dance")
    with worker(adapter) as engine, pytest.raises(BenchmarkError, match="ValueError: no such model"):
        engine.ask("load", settings={"fail": "load"})


def test_a_worker_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.exit('out of luck')")
    with worker(script) as engine, pytest.raises(BenchmarkError, match="has ended: out of luck"):
        engine.ask("load", settings={})
    assert "out of luck" in script.with_suffix(".log").read_text()


def fake_bench(adapter: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]) -> Bench:
    monkeypatch.setattr(measure_module, "start", lambda *_: worker(adapter))
    monkeypatch.setattr(measure_module, "IDLE_S", 0.01)
    found = {key: Found(Peer(key, "", (), "", ""), Path(sys.executable)) for key in keys}
    checkpoints = Checkpoints("qwen2.5-0.5b", adapter.parent)
    logs = adapter.parent / "logs"
    return Bench(checkpoints, CONDITIONS, found, 3, logs, lambda what: None, lambda row, engine, value: None)


def fake_setup(key: str, fail: str = "") -> Setup:
    return Setup(key, "int8", "weights", "float32", lambda *_: {"fail": fail})


def test_one_engine_that_fails_does_not_end_the_others(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fake_bench(adapter, monkeypatch, ["penstock", "openvino", "llama.cpp"])
    wanted = [fake_setup("penstock"), fake_setup("openvino", "load"), fake_setup("llama.cpp", "short")]
    row = Row("served-32", "many", "served", 32, 4, 4, ("int8",))
    good, absent, short = measure(bench, wanted, [row], startup=False)
    assert len(good.samples["served-32"]) == 3
    assert good.samples["memory"][0] > 1_000_000
    assert not good.problems
    assert absent.problems == {"load": "ValueError: no such model"}
    assert "instead of" in short.problems["load"]
    assert not short.samples


def test_start_is_measured_after_one_start_that_is_not(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fake_bench(adapter, monkeypatch, ["penstock"])
    (result,) = measure(bench, [fake_setup("penstock")], [], startup=True)
    assert len(result.samples["startup"]) == 3
    assert min(result.samples["startup"]) > 0


def test_rows_measure_what_they_say() -> None:
    asked: list[tuple[int, int, int]] = []

    def generate(prompts: list[list[int]], tokens: int) -> float:
        asked.append((len(prompts), len(prompts[0]), tokens))
        return 0.5 + 0.01 * tokens

    decode, prefill, served, _ = ROWS
    assert decode.measure(generate, "a") == pytest.approx(64 / 0.64)
    assert prefill.measure(generate, "a") == pytest.approx(512 / 0.51)
    assert served.measure(generate, "a") == pytest.approx(8 * 128 / 1.78)
    assert asked == [(1, 32, 1), (1, 32, 65), (1, 512, 1), (8, 128, 128)]


def test_prompts_are_equal_for_all_engines_and_unique_otherwise() -> None:
    seen: list[tuple[int, ...]] = []

    def generate(prompts: list[list[int]], tokens: int) -> float:
        seen.extend(map(tuple, prompts))
        return float(tokens)

    for seed in ("1", "1", "2"):
        ROWS[0].measure(generate, seed)
    assert seen[:2] == seen[2:4]
    assert len(set(seen)) == 4


def test_ceilings_of_rows() -> None:
    shape, limits = Shape.read("tinyllama-1.1b"), Ceilings(40e9, 1e12, 0.25e12)
    decode, prefill, served, many = (row.ceiling(shape, "int8", limits) for row in ROWS)
    assert decode == pytest.approx(40e9 / (shape.weight_bytes("int8") + shape.kv_bytes(64.5)))
    assert 400 < prefill < 512 / (2 * shape.linear * 512 / 1e12)
    assert decode < served < many < 1e12 / (2 * shape.linear)
    assert all(row.tokens() <= 32 * 128 for row in (*ROWS, *QUICK_ROWS))


def test_checkpoints_have_the_parameters_of_the_models() -> None:
    for shape, count in PARAMETERS.items():
        config = json.loads((SHAPES / shape / "config.json").read_text())
        sizes = tensor_shapes(config).values()
        assert sum(size[0] * (size[1] if len(size) == 2 else 1) for size in sizes) == count


def test_every_id_of_the_tokenizer_is_text() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(letter_tokenizer(2000)))
    assert tokenizer.get_vocab_size() == 2000
    assert tokenizer.decode([300, 999]).isalpha()
    assert tokenizer.decode(tokenizer.encode("abc zz").ids) == "abc zz"


def test_every_precision_has_penstock_and_a_peer() -> None:
    for precision in PRECISIONS:
        keys = [setup.key for setup in setups(precision, CONDITIONS)]
        assert keys[0] == "penstock"
        assert len(keys) > 1
        assert set(keys) <= set(PEERS)


def test_a_peer_that_is_not_there_says_so(tmp_path: Path) -> None:
    found = find("llama.cpp", tmp_path, install=False, say=print)
    assert found.python is None
    assert "--no-install" in found.reason
    with pytest.raises(BenchmarkError, match=r"llama\.cpp is not in"):
        found.interpreter()


def test_kv_type_follows_the_processor() -> None:
    assert default_kv_cache_dtype("flags : avx512f avx512_bf16 amx_tile") == "bfloat16"
    assert default_kv_cache_dtype("flags : avx512f avx512_vnni") == "float32"


def section(**engines: list[float]) -> dict[str, Any]:
    peaks = {"threads": 2, "read_gb_s": 40.0, "float32_gflops": 250.0, "int8_gops": 1000.0, "bfloat16_gflops": None}
    results = [
        {
            "engine": key.replace("_", "."),
            "name": key,
            "weights": "int8",
            "kv_cache": "float32",
            "versions": {key: "1.0"},
            "notes": "",
            "samples": {"decode": values, "memory": [1e9 / values[0]]} if values else {},
            "problems": {} if values else {"load": "out of memory"},
            "idle_cpu": 0.0,
        }
        for key, values in engines.items()
    ]
    return {"ceilings": [{"all_threads": peaks}] * 2, "results": results, "http": {}}


def cells(table: str, title: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratio_is_against_the_best_peer_of_the_row() -> None:
    five = [30.0, 31.0, 30.5, 30.2, 30.8]
    data = section(penstock=five, openvino=[20.0] * 5, llama_cpp=[25.0] * 5)
    table = shape_table("tinyllama-1.1b", {"int8": data}, ROWS)
    row = cells(table, "decode, 1 request, int8")
    assert row[1:4] == ["30.5 (30–31)", "20 (20–20)", "**25 (25–25)**"]
    assert row[4:6] == ["1.22 (1.20–1.24)", "better"]
    assert float(row[6]) == pytest.approx(38.6, abs=1.0)
    assert row[7].endswith("%")
    assert relative(data, "decode") == pytest.approx({"penstock": 1.22, "openvino": 0.8, "llama.cpp": 1.0})


def test_what_rounds_cannot_decide_is_undecided() -> None:
    data = section(penstock=[30.0, 20.0, 31.0, 26.0, 27.0], openvino=[25.0] * 5)
    row = cells(shape_table("tinyllama-1.1b", {"int8": data}, ROWS), "decode, 1 request, int8")
    assert row[4] == "undecided"


def test_fewer_rounds_of_a_slow_peer_are_named_and_less_memory_is_better() -> None:
    data = section(penstock=[30.0] * 5, openvino=[2.0, 2.0])
    table = shape_table("tinyllama-1.1b", {"int8": data}, ROWS)
    assert cells(table, "decode, 1 request, int8")[2] == "**2 (2–2, n=2)**"
    memory = cells(table, "peak memory at 32 requests, GB, int8")
    assert memory[1] == "0.0333"
    assert memory[3].startswith("0.07")


def test_a_failed_engine_is_in_the_table_and_the_notes() -> None:
    data = section(penstock=[30.0] * 5, vllm=[])
    assert cells(shape_table("tinyllama-1.1b", {"int8": data}, ROWS), "decode")[2] == "failed"
    text = "\n".join(notes({"tinyllama-1.1b int8": data}))
    assert "vllm, tinyllama-1.1b int8: load failed: out of memory" in text
    assert "Versions: penstock 1.0, vllm 1.0." in text


def test_a_busy_machine_is_named() -> None:
    data = section(penstock=[30.0] * 5)
    assert "do not trust" not in ceilings_text("a", data)
    busy = {"all_threads": data["ceilings"][0]["all_threads"] | {"read_gb_s": 20.0}}
    assert "do not trust" in ceilings_text("a", data | {"ceilings": [data["ceilings"][0], busy]})
    row = ROWS[0]
    assert row_ceiling(row, "tinyllama-1.1b", "int8", data | {"ceilings": [busy]}) < 25
    both = data | {"ceilings": [data["ceilings"][0], busy]}
    assert row_ceiling(row, "tinyllama-1.1b", "int8", both) == row_ceiling(row, "tinyllama-1.1b", "int8", data)
