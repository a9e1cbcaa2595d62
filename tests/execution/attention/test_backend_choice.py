"""`--attention-backend auto` on a GPU, with backends and a stopwatch that only pretend; and what a name that cannot run says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.execution.attention import backend as registry
from penstock.execution.attention.backend import AttentionBackend, KVCacheSpec, get_attention_backend
from penstock.execution.attention.choice import DECODE, PREFILL, Step, StepTimes, choose_backend, compare, fastest
from penstock.execution.attention.stopwatch import DeviceStopwatch, step_metadata
from penstock.execution.attention.torch_paged import TorchPagedAttention
from tests.execution.attention.package_doubles import FlashDouble

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
SPEC = KVCacheSpec(16, 8, 128, torch.bfloat16, torch.bfloat16)


class Pretender(TorchPagedAttention):
    """A backend by name only."""

    def __init__(self, name: str, reason: str | None = None) -> None:
        self.name = name
        self.reason = reason

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        return self.reason


class PretendedStopwatch:
    """seconds: microseconds of decode and prefill by name; an exception is raised when its turn comes."""

    def __init__(self, microseconds: Mapping[str, tuple[float, float] | Exception]) -> None:
        self.microseconds = microseconds
        self.log: list[tuple[str, str]] = []

    def warm_up(self, backend: AttentionBackend, step: Step) -> None:
        self.log.append(("warm up", backend.name))

    def seconds(self, backend: AttentionBackend, step: Step) -> float:
        self.log.append(("measure", backend.name))
        found = self.microseconds[backend.name]
        if isinstance(found, Exception):
            raise found
        return found[step is PREFILL] / 1e6


def install(monkeypatch: pytest.MonkeyPatch, **makers: Callable[[], AttentionBackend]) -> list[str]:
    """Puts backends into the registry; the names in order, ours first."""
    for name, maker in makers.items():
        holder = sys.modules[__name__]
        monkeypatch.setattr(holder, f"made_{name}", maker, raising=False)
        monkeypatch.setitem(registry._BACKENDS, name, f"{__name__}:made_{name}")
    return list(makers)


def maker(name: str, *, graphs: bool = True, reason: str | None = None) -> Callable[[], AttentionBackend]:
    def make() -> AttentionBackend:
        return Pretender(name, reason)

    make.supports_graphs = graphs  # type: ignore[attr-defined]
    return make


def choose(
    names: list[str], times: Mapping[str, tuple[float, float] | Exception] | None = None, *, graphs: bool = True
) -> str | None:
    """times: None when nothing may be timed."""

    def stopwatch(*_: Any) -> PretendedStopwatch:
        assert times is not None, "nothing should have been timed"
        return PretendedStopwatch(times)

    chosen = choose_backend(names, CPU, SPEC, torch.bfloat16, num_heads=32, graphs=graphs, make_stopwatch=stopwatch)
    return None if chosen is None else chosen.name


@pytest.mark.parametrize(
    ("ours", "other", "winner"),
    [
        ((100.0, 320.0), (110.0, 400.0), "ours"),
        ((100.0, 320.0), (60.0, 320.0), "other"),
        ((100.0, 320.0), (117.0, 16.0), "ours"),  # 118 against 120: within 3 %
        ((100.0, 320.0), (115.0, 16.0), "other"),  # 116 against 120
        ((100.0, 1600.0), (120.0, 160.0), "other"),  # a slower decode, paid for by the prefill
    ],
)
def test_the_cheaper_is_chosen_and_ours_within_the_margin(
    ours: tuple[float, float], other: tuple[float, float], winner: str
) -> None:
    times = {"ours": StepTimes(*ours), "other": StepTimes(*other)}
    assert fastest([Pretender("ours"), Pretender("other")], times).name == winner


def test_the_choice_is_logged_with_all_figures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = install(monkeypatch, ours=maker("ours"), other=maker("other"), third=maker("third", reason="no such heads"))
    with caplog.at_level(logging.INFO, "penstock"):
        assert choose(names, {"ours": (100.0, 320.0), "other": (60.0, 160.0)}) == "other"
    (record,) = caplog.records
    assert record.message == (
        "attention: other; a layer's decode + prefill / 16: ours 120.0 µs (decode 100.0, prefill 320.0), "
        "other 70.0 µs (decode 60.0, prefill 160.0); third: no such heads"
    )


def test_nothing_is_timed_for_one_candidate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    names = install(monkeypatch, ours=maker("ours"), other=maker("other", reason="no 8-bit caches"))
    with caplog.at_level(logging.INFO, "penstock"):
        assert choose(names) == "ours"
    assert caplog.messages == ["attention: ours, the only candidate; other: no 8-bit caches"]


def test_what_cannot_be_recorded_competes_only_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = install(monkeypatch, ours=maker("ours"), other=maker("other", graphs=False))
    assert choose(names, graphs=True) == "ours"
    assert choose(names, {"ours": (100.0, 320.0), "other": (60.0, 160.0)}, graphs=False) == "other"


def test_none_when_nothing_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(install(monkeypatch, ours=maker("ours", reason="heads of 7"))) is None
    assert choose([]) is None


def test_a_package_that_fails_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> AttentionBackend:
        raise OSError("undefined symbol: _ZN3c104cuda")

    broken.supports_graphs = True  # type: ignore[attr-defined]
    names = install(monkeypatch, ours=maker("ours"), broken=broken, slow=maker("slow"))
    times: dict[str, tuple[float, float] | Exception] = {
        "ours": (100.0, 320.0),
        "slow": RuntimeError("no kernel image is available"),
    }
    with caplog.at_level(logging.WARNING, "penstock"):
        assert choose(names, times) == "ours"
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "attention: broken is not used: OSError: undefined symbol: _ZN3c104cuda",
        "attention: slow is not used: RuntimeError: no kernel image is available",
    ]


def test_ours_must_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> AttentionBackend:
        raise SyntaxError("ours")

    broken.supports_graphs = True  # type: ignore[attr-defined]
    with pytest.raises(SyntaxError):
        choose(install(monkeypatch, ours=broken))


def test_no_memory_for_timing_means_ours(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def stopwatch(*_: Any) -> PretendedStopwatch:
        raise torch.OutOfMemoryError("CUDA out of memory")

    names = install(monkeypatch, ours=maker("ours"), other=maker("other"))
    chosen = choose_backend(names, CPU, SPEC, torch.bfloat16, num_heads=32, graphs=True, make_stopwatch=stopwatch)
    assert chosen is not None
    assert chosen.name == "ours"
    assert "no memory to time others" in caplog.text


def test_rounds_are_interleaved_and_end_with_the_budget() -> None:
    stopwatch = PretendedStopwatch({"ours": (100.0, 320.0), "other": (60.0, 160.0)})
    now = iter([0.0, 0.2, 0.4, 0.6, 0.8])
    times = compare([Pretender("ours"), Pretender("other")], stopwatch, clock=lambda: next(now), budget_seconds=0.5)
    assert stopwatch.log[:4] == [("warm up", "ours")] * 2 + [("warm up", "other")] * 2
    assert stopwatch.log[4:] == ([("measure", "ours")] * 2 + [("measure", "other")] * 2) * 3
    assert times["other"].cost == pytest.approx(70e-6)


@pytest.mark.parametrize("step", [DECODE, PREFILL])
def test_representative_steps_are_whole(step: Step) -> None:
    """Every token has its own slot, in a block of its request's table."""
    blocks = torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    metadata = step_metadata(step, blocks, 16)
    assert metadata.num_tokens == step.requests * step.tokens == len(set(metadata.slot_mapping.tolist()))
    assert metadata.num_requests == step.requests
    assert metadata.num_decodes == (step.requests if step is DECODE else 0)
    last = metadata.slot_mapping[metadata.query_start[1:].long() - 1]
    assert torch.equal(last, metadata.block_tables[:, -1].long() * 16 + 15)
    assert len(set(metadata.block_tables.flatten().tolist())) == metadata.block_tables.numel()


def test_the_stopwatch_hands_out_steps_that_run() -> None:
    """What it measures with on a GPU, on a CPU and with the backend that defines what is right."""
    spec = KVCacheSpec(16, 1, 8, torch.float32, torch.float32)
    backend = TorchPagedAttention()
    stopwatch = DeviceStopwatch(backend, CPU, spec, torch.float32, 2)
    for step in (DECODE, PREFILL):
        stopwatch.warm_up(backend, step)
        inputs = stopwatch.inputs[step]
        assert inputs.query.shape == (step.requests * step.tokens, 2, 8)
        assert inputs.metadata.plan


@pytest.mark.parametrize("name", ["flashinfer", "flash-attention"])
def test_packages_for_gpus_are_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend {name} runs on a GPU only; use auto"):
        get_attention_backend(name, CPU)


def test_auto_looks_for_packages_and_a_name_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def remember(names: list[str], *_: Any, **__: Any) -> AttentionBackend:
        seen.append(names)
        return Pretender(names[-1])

    monkeypatch.setattr("penstock.execution.attention.choice.choose_backend", remember)
    monkeypatch.setattr(registry, "triton_runs_on", lambda device: True)
    for module in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    get_attention_backend("auto", CUDA, spec=SPEC, arithmetic=torch.bfloat16, num_heads=32)
    monkeypatch.setitem(sys.modules, "flash_attn", FlashDouble(2).module)
    get_attention_backend("auto", CUDA, spec=SPEC, arithmetic=torch.bfloat16, num_heads=32)
    assert seen == [["triton"], ["triton", "flash-attention"]]
    assert get_attention_backend("flash-attention", CUDA).name == "flash-attention"
    assert len(seen) == 2


def test_a_named_package_that_is_broken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> AttentionBackend:
        raise OSError("undefined symbol: _ZN3c104cuda")

    monkeypatch.setattr(registry, "triton_runs_on", lambda device: True)
    monkeypatch.setattr(registry, "make_backend", broken)
    with pytest.raises(
        ConfigError, match=r"flashinfer: its package cannot be used \(OSError: undefined symbol.*use auto"
    ):
        get_attention_backend("flashinfer", CUDA)
