"""Which engine runs in which precision, with which settings: the same number of threads, the same KV precision, room for as many tokens.

Weights are what a user of that engine gets when asking for the precision; what exactly that is stands beside the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu.checkpoints import ADAPTERS, Checkpoints
from benchmarks.cpu.peers import Found
from benchmarks.cpu.worker import Worker

PRECISIONS = ("int8", "int4 g128", "bf16", "fp32")
KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
GIB = 2**30


@dataclass(frozen=True)
class Conditions:
    """What is equal for all engines. kv_tokens: tokens that the KV cache of each has room for."""

    threads: int
    kv_cache_dtype: str
    kv_tokens: int
    max_num_seqs: int
    max_model_len: int


@dataclass(frozen=True)
class Setup:
    """An engine in one precision. `weights` and `kv` say what it really computes with."""

    key: str
    precision: str
    weights: str
    kv: str
    settings: Callable[[Checkpoints, Path, Conditions], dict[str, Any]]


def setups(precision: str, conditions: Conditions) -> list[Setup]:
    """The engines that can run in this precision, Penstock first."""
    kv = conditions.kv_cache_dtype
    table = {
        "int8": [
            Setup("penstock", precision, "int8 per channel, head too", kv, _penstock(quantization="int8")),
            Setup("openvino", precision, "int8 per channel, asymmetric, head too", kv, _openvino("int8")),
            Setup("llama.cpp", precision, "Q8_0: int8, group 32, head too", kv, _llama("q8_0")),
        ],
        "int4 g128": [
            Setup(
                "penstock",
                precision,
                "int4, group 128; head int8",
                kv,
                _penstock(quantization="int4", quantization_group_size=128),
            ),
            Setup("openvino", precision, "int4, group 128, asymmetric; head int8", kv, _openvino("int4")),
            Setup("llama.cpp", precision, "Q4_0: int4, group 32; head 6 or 8 bits", kv, _llama("q4_0")),
        ],
        "bf16": [
            Setup("penstock", precision, "bfloat16", kv, _penstock()),
            Setup("openvino", precision, "bfloat16", kv, _openvino("bf16")),
            Setup("llama.cpp", precision, "BF16", kv, _llama("bf16")),
            Setup("vllm", precision, "bfloat16", "bfloat16", _vllm("bfloat16")),
            Setup("transformers", precision, "bfloat16", "bfloat16", _transformers("bfloat16")),
        ],
        "fp32": [
            Setup("penstock", precision, "float32", kv, _penstock(dtype="float32")),
            Setup("vllm", precision, "float32", "float32", _vllm("float32")),
            Setup("transformers", precision, "float32", "float32", _transformers("float32")),
        ],
    }
    return table[precision]


def start(setup: Setup, found: Found, conditions: Conditions, log: Path) -> Worker:
    """The engine's process, not loaded yet."""
    environment = {"OMP_NUM_THREADS": str(conditions.threads), "HF_HUB_OFFLINE": "1", **found.peer.environment}
    return Worker(found.interpreter(), ADAPTERS / found.peer.adapter, environment, log)


def _penstock(**more: Any) -> Callable[[Checkpoints, Path, Conditions], dict[str, Any]]:
    def settings(checkpoints: Checkpoints, python: Path, conditions: Conditions) -> dict[str, Any]:
        per_token = checkpoints.kv_bytes_per_token(KV_BYTES[conditions.kv_cache_dtype])
        return {
            "model": str(checkpoints.hugging_face()),
            "threads": conditions.threads,
            "kv_cache_dtype": conditions.kv_cache_dtype,
            "kv_cache_gib": conditions.kv_tokens * per_token / GIB,
            "max_num_seqs": conditions.max_num_seqs,
            "max_model_len": conditions.max_model_len,
            "prefix_caching": False,
            **more,
        }

    return settings


def _openvino(kind: str) -> Callable[[Checkpoints, Path, Conditions], dict[str, Any]]:
    def settings(checkpoints: Checkpoints, python: Path, conditions: Conditions) -> dict[str, Any]:
        return {
            "model": str(checkpoints.openvino(python, kind)),
            "threads": conditions.threads,
            "kv_cache_dtype": conditions.kv_cache_dtype,
            "kv_tokens": conditions.kv_tokens,
            "max_num_seqs": conditions.max_num_seqs,
            "max_num_batched_tokens": 512,
        }

    return settings


def _llama(kind: str) -> Callable[[Checkpoints, Path, Conditions], dict[str, Any]]:
    def settings(checkpoints: Checkpoints, python: Path, conditions: Conditions) -> dict[str, Any]:
        return {
            "model": str(checkpoints.gguf(python, kind)),
            "threads": conditions.threads,
            "kv_cache_dtype": conditions.kv_cache_dtype,
        }

    return settings


def _vllm(dtype: str) -> Callable[[Checkpoints, Path, Conditions], dict[str, Any]]:
    def settings(checkpoints: Checkpoints, python: Path, conditions: Conditions) -> dict[str, Any]:
        return {
            "model": str(checkpoints.hugging_face()),
            "dtype": dtype,
            "kv_bytes": conditions.kv_tokens * checkpoints.kv_bytes_per_token(KV_BYTES[dtype]),
            "max_num_seqs": conditions.max_num_seqs,
            "max_model_len": conditions.max_model_len,
            "eager": True,
        }

    return settings


def _transformers(dtype: str) -> Callable[[Checkpoints, Path, Conditions], dict[str, Any]]:
    def settings(checkpoints: Checkpoints, python: Path, conditions: Conditions) -> dict[str, Any]:
        return {"model": str(checkpoints.hugging_face()), "dtype": dtype, "threads": conditions.threads}

    return settings
