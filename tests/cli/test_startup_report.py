"""What `penstock serve` says of a GPU when it is ready."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.cli.startup_report import startup_report
from penstock.core.config import EngineConfig, ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import Hello, ModelInfo

MODEL = ModelInfo(
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    device="cuda",
    device_name="NVIDIA H200, compute capability 9.0",
    vocab_size=100,
    max_model_len=2048,
    eos_token_ids=(2,),
    num_parameters=10**9,
    weight_bytes=2 * 10**9,
    model_hash="",
    attention_backend="triton",
    kernels="Triton 3.6.0 kernels",
    cuda_graphs="captured 35 graphs for batches up to 256 in 3.1 s, 410.0 MiB",
    max_inflight_steps=2,
)


def _report(**changes: Any) -> str:
    hello = Hello(model=msgspec.structs.replace(MODEL, **changes), timeline=[])
    gateway = GatewayConfig(auth="none")
    return startup_report(EngineConfig(), ServerConfig(), gateway, hello, "m", "http://localhost:8000", 1.0)


def test_the_report_says_what_runs_on_which_gpu() -> None:
    report = _report()
    assert (
        "runs on        cuda (NVIDIA H200, compute capability 9.0), Triton 3.6.0 kernels, attention by triton" in report
    )
    assert (
        "steps          captured 35 graphs for batches up to 256 in 3.1 s, 410.0 MiB; each prepared while the one before it runs"
        in report
    )
    assert "; each prepared when the one before it is done" in _report(max_inflight_steps=1)
    assert "steps  " not in _report(device="cpu", device_name="", cuda_graphs="", max_inflight_steps=1)


def test_float32_on_a_gpu_is_not_silent() -> None:
    assert "--dtype bfloat16 reads half the bytes per token" in _report(dtype="float32")
    assert "--dtype bfloat16" not in _report()


def test_the_report_says_how_a_model_is_spread_and_where_drafts_come_from() -> None:
    assert "ranks  " not in _report()
    assert "speculation" not in _report()
    assert "ranks          2 processes: every layer over 2\n" in _report(tensor_parallel_size=2)
    both = _report(tensor_parallel_size=2, pipeline_parallel_size=2, speculation="up to 8 tokens by n-grams")
    assert "ranks          4 processes: every layer over 2, the layers over 2 stages\n" in both
    assert "speculation    up to 8 tokens by n-grams\n" in both
