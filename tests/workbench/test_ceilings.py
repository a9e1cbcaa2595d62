"""The machine's ceilings and the share of them that kernels reach: arithmetic of the figures, and both commands end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from penstock.cli.bench import GROUPS, KINDS, MODELS, TOKENS, bench
from penstock.execution.kernels import native
from penstock.execution.measurement import attention, cases, ceilings, linear, sampling
from penstock.execution.measurement.ceilings import Ceilings, higher_of, measure_ceilings
from penstock.execution.measurement.timing import ROTATION_BYTES, Case, ceiling_seconds, copies_needed, time_case
from penstock.workbench.bench.ceilings import CeilingsReport, Peaks, ceilings_table
from penstock.workbench.bench.environment import describe_environment
from penstock.workbench.bench.kernels_bench import KernelFigure, kernels_table

needs_native = pytest.mark.skipif(not native.native_available(), reason="there are no native kernels here")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts of milliseconds, and rotations of a few copies."""
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 24)
    monkeypatch.setattr(ceilings, "ATTEMPTS", 2)
    monkeypatch.setattr(ceilings, "ATTEMPT_S", 0.002)
    monkeypatch.setattr(ceilings, "MATRIX", 128)
    for module in (linear, attention, sampling):
        monkeypatch.setattr(module, "copies_needed", lambda nbytes: 2)


def a_case(*, bytes_read: float = 1e6, operations: float = 1e6, arithmetic: str = "int8") -> Case:
    calls = iter(range(10**9))
    return Case("kernel", "shape", 1, bytes_read, operations, arithmetic, lambda: next(calls), None, "")  # type: ignore[arg-type]


def some_ceilings(**changes: float | None) -> Ceilings:
    values: dict[str, float | None] = {"read_bytes": 1e9, "float32": 1e9, "int8": 4e9, "bfloat16": None}
    return Ceilings(threads=1, instructions={}, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "seconds"),
    [
        (a_case(bytes_read=2e9, operations=4e9), 2.0),
        (a_case(bytes_read=1e9, operations=12e9), 3.0),
        (a_case(operations=5e9, arithmetic="float32"), 5.0),
        (a_case(operations=5e9, arithmetic="bfloat16"), 5.0),
    ],
    ids=["memory binds", "arithmetic binds", "float32", "no bfloat16 units: float32"],
)
def test_the_slower_of_memory_and_arithmetic_is_the_ceiling(case: Case, seconds: float) -> None:
    assert ceiling_seconds(case, some_ceilings()) == pytest.approx(seconds)


def test_the_higher_of_two_measurements_counts() -> None:
    highest = higher_of(some_ceilings(read_bytes=3e9, bfloat16=None), some_ceilings(int8=9e9, bfloat16=5e9))
    assert (highest.read_bytes, highest.int8, highest.bfloat16) == (3e9, 9e9, 5e9)
    assert higher_of(some_ceilings(), some_ceilings()).bfloat16 is None


def test_rotating_copies_do_not_fit_a_cache() -> None:
    assert copies_needed(ROTATION_BYTES) == 1
    assert copies_needed(ROTATION_BYTES // 3) * (ROTATION_BYTES // 3) >= ROTATION_BYTES


def test_a_case_is_timed_beside_its_reference() -> None:
    slow = torch.ones(400, 400)
    case = Case("kernel", "shape", 1, 1.0, 1.0, "float32", lambda: None, lambda: slow @ slow, "mm")
    timing = time_case(case, 0.02)
    assert timing.reference_s is not None
    assert 0 < timing.seconds < timing.reference_s


def test_measured_ceilings_leave_the_threads_as_they_were(small: None) -> None:
    before = torch.get_num_threads()
    measured = measure_ceilings(1)
    assert torch.get_num_threads() == before
    assert measured.read_bytes > 1e8
    assert measured.float32 > 1e8


@needs_native
def test_integer_products_outrun_float32_on_processors_with_vnni(small: None) -> None:
    measured = measure_ceilings(1)
    if measured.instructions.get("int8") not in ("avx512_vnni", "amx"):
        pytest.skip("this processor has no VNNI")
    assert measured.int8 is not None
    assert measured.int8 > 1.5 * measured.float32


def test_ceilings_table_names_what_is_missing() -> None:
    one = Peaks(threads=1, read_gb_s=10.04, float32_gflops=150.2, int8_gops=600.0, bfloat16_gflops=None)
    two = Peaks(threads=2, read_gb_s=20.0, float32_gflops=300.0, int8_gops=1200.0, bfloat16_gflops=None)
    report = CeilingsReport(
        environment=describe_environment(), instructions={"int8": "avx512_vnni"}, one_thread=one, all_threads=two
    )
    lines = ceilings_table(report).splitlines()
    assert lines[0].split() == ["1", "thread", "2", "threads"]
    assert lines[2].split()[-2:] == ["10.0", "20.0"]
    assert lines[4].startswith("int8 products, GOPS (avx512_vnni)")
    assert lines[4].split()[-2:] == ["600", "1,200"]
    assert lines[5].count("no instructions") == 2


def figure(seconds: float, reference_s: float | None = None) -> KernelFigure:
    return KernelFigure(
        kernel="linear int8",
        shape="o 8x8",
        rows=1,
        bytes_read=1e6,
        operations=2e6,
        seconds=seconds,
        ceiling_s=1e-4,
        reference="F.linear",
        reference_s=reference_s,
    )


def test_kernels_table_has_rates_and_shares() -> None:
    row = kernels_table([figure(2e-4, reference_s=5e-4)]).splitlines()[2]
    assert row.split() == ["linear", "int8", "o", "8x8", "1", "200", "5.0", "10", "50%", "500", "2.50", "F.linear"]
    assert "–" in kernels_table([figure(2e-4)])


def test_kernels_above_the_ceiling_are_not_believed() -> None:
    assert "1 kernels seem faster than the ceiling" in kernels_table([figure(2e-4), figure(5e-5)])
    assert "seem faster" not in kernels_table([figure(2e-4)])


def test_choices_of_the_command_are_those_that_are_measured() -> None:
    assert tuple(linear.MODELS) == tuple(attention.HEADS) == tuple(sampling.VOCABULARIES) == MODELS
    assert (linear.KINDS, linear.TOKENS, cases.GROUPS) == (KINDS, TOKENS, GROUPS)


def test_shapes_are_those_of_the_models() -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes"
    for model, layers in linear.MODELS.items():
        config = json.loads((folder / model / "config.json").read_text())
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads, head_dim = attention.HEADS[model]
        assert (heads, kv_heads) == (config["num_attention_heads"], config["num_key_value_heads"])
        assert layers["qkv"] == ((heads + 2 * kv_heads) * head_dim, hidden)
        assert layers["gate_up"] == (2 * inner, hidden)
        assert layers["down"] == (hidden, inner)
        assert layers["head"] == (config["vocab_size"], hidden)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_native_and_reference_compute_the_same_product(kind: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.MODELS, "tiny", {"o": (128, 256)})
    (case,) = linear.linear_cases("tiny", kind, [4], bf16_arithmetic=False)
    assert case.reference is not None
    own, other = case.run(), case.reference()
    assert isinstance(own, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert case.operations == 2 * 4 * 128 * 256
    assert torch.nn.functional.cosine_similarity(own.flatten(), other.float().flatten(), dim=0) > 0.99


@needs_native
def test_commands_write_what_they_print(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.MODELS, "qwen2.5-0.5b", {"o": (64, 64)})
    path = tmp_path / "kernels.json"
    arguments = ["kernels", "--model", "qwen2.5-0.5b", "--group", "linear", "--kind", "int8", "--tokens", "2"]
    done = CliRunner().invoke(bench, [*arguments, "--seconds", "0.01", "--threads", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "o 64x64" in done.output
    (stored,) = json.loads(path.read_text())["figures"]
    assert (stored["kernel"], stored["rows"]) == ("linear int8", 2)
    done = CliRunner().invoke(bench, ["ceilings", "--threads", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["all_threads"]["threads"] == 1
