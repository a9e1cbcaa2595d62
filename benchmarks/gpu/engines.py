"""Penstock's engine as the end-to-end sections use it: random weights in the shape of a real model, exact lengths, in this process."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common import SHAPES
from benchmarks.cpu.rows import TOKEN_RANGE
from benchmarks.gpu.case import Context, Plan
from benchmarks.gpu.roofline import FORMATS, Format, Sizes

from penstock.core.types import EngineStats
from penstock.llm import LLM
from penstock.workbench.bench.offline import BatchRun, run_batch
from penstock.workbench.bench.workload import BenchRequest

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "quantization_group_size": 128},
    "fp8": {"quantization": "fp8"},
}
# What such weights weigh: the head of rounded models has 8 bits.
WEIGHTS = {"bf16": "bf16", "int8": "int8", "int4": "int4 g128, head int8", "fp8": "fp8"}
KV_SCALE_BYTES = 4
# Seconds to load a shape, graphs included, about.
LOAD_S = {"tinyllama-1.1b": 15.0, "qwen3-0.6b": 15.0, "qwen2.5-1.5b": 18.0, "llama-3.1-8b": 45.0}
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 256
# The smallest model that every kernel takes; its vocabulary holds the ids of all workloads.
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Setup:
    """An engine: shape, precision of the weights, type of the KV cache, and settings other than the defaults."""

    shape: str
    precision: str = "bf16"
    kv: str = "auto"
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """For people and for groups of cases."""
        kv = "" if self.kv == "auto" else f" {self.kv}-KV"
        return f"{self.shape} {self.precision}{kv}" + "".join(f" {key}={value}" for key, value in self.settings)

    @property
    def weights(self) -> Format:
        return FORMATS[WEIGHTS[self.precision]]

    def sizes(self, plan: Plan) -> Sizes:
        return Sizes.of(TINY_CONFIG) if plan.tiny else Sizes.read(self.shape)  # type: ignore[arg-type]

    def kv_bytes(self, plan: Plan) -> float:
        """Of one number of the KV cache, with its part of the scale of a token's head where it is rounded."""
        return 2.0 if self.kv == "auto" else 1.0 + KV_SCALE_BYTES / self.sizes(plan).head_dim

    def folder(self, plan: Plan) -> Path:
        """A folder with the config.json."""
        return tiny_folder() if plan.tiny else SHAPES / self.shape

    def engine_settings(self, plan: Plan) -> dict[str, Any]:
        """Keyword arguments of LLM and, model included, fields of EngineConfig."""
        common: dict[str, Any] = {
            "model": str(self.folder(plan)),
            "load_format": "dummy",
            "device": plan.device,
            "kv_cache_dtype": self.kv,
            "weight_cache": False,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
        }
        if plan.tiny:
            common |= {"dtype": "float32", "kv_cache_gib": 0.05, "max_num_seqs": 8, "threads": 1}
        else:
            common["dtype"] = "bfloat16"
        settings = common | PRECISIONS[self.precision] | dict(self.settings)
        if plan.tiny and settings.get("quantization_group_size"):
            settings["quantization_group_size"] = 32
        return settings


@cache
def tiny_folder() -> Path:
    """A folder with TINY_CONFIG that lasts as long as this process."""
    keeper = tempfile.TemporaryDirectory(prefix="penstock-tiny-")
    _KEPT.append(keeper)
    folder = Path(keeper.name)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@dataclass
class Engine:
    """An engine that is loaded, with what it says of itself."""

    setup: Setup
    llm: LLM
    load_s: float
    _rounds: int = field(default=0, repr=False)

    def shutdown(self) -> None:
        self.llm.shutdown()

    def run(self, requests: Sequence[BenchRequest], *, temperature: float = 0.0) -> BatchRun:
        """Everything at once, every output to its length. Raises BenchmarkError when one fails."""
        return run_batch(self.llm, requests, temperature=temperature)

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> float:
        """Seconds for `output_tokens` of each prompt."""
        requests = [BenchRequest(index, prompt, len(prompt), output_tokens) for index, prompt in enumerate(prompts)]
        return self.run(requests).wall_s

    def described(self) -> dict[str, Any]:
        """What a figure depends on, as the engine reports it."""
        info = self.llm.model_info
        return {
            "load_s": round(self.load_s, 2),
            "weights": info.weights,
            "weight_bytes": info.weight_bytes,
            "kv_cache_dtype": info.kv_cache_dtype,
            "kv_cache_tokens": info.kv_cache_tokens,
            "attention_backend": info.attention_backend,
            "kernels": info.kernels,
            "cuda_graphs": info.cuda_graphs,
            "max_inflight_steps": info.max_inflight_steps,
        }


def idle_share(before: EngineStats, after: EngineStats) -> float | None:
    """Share of the time between two snapshots in which the GPU had work to wait for; None on a CPU."""
    busy = after.device_seconds - before.device_seconds
    idle = after.device_idle_seconds - before.device_idle_seconds
    return idle / (busy + idle) if busy + idle > 0 else None


def load(setup: Setup, plan: Plan, **more: Any) -> Engine:
    """Load an engine and warm it up with two small batches."""
    started = time.perf_counter()
    llm = LLM(**(setup.engine_settings(plan) | more))
    engine = Engine(setup, llm, time.perf_counter() - started)
    for number, count in enumerate((1, 8)):
        engine.generate(draw_prompts(count, 16, f"warm-up/{number}"), 4)
    return engine


def kept_engine(context: Context, setup: Setup) -> Engine:
    """The engine that the last case of this group left, or a new one in its place."""
    engine = context.kept.get("engine")
    if isinstance(engine, Engine) and engine.setup == setup:
        return engine
    if engine is not None:
        context.kept.pop("engine").shutdown()
    engine = load(setup, context.plan)
    context.kept["engine"] = engine
    return engine


def draw_prompts(count: int, tokens: int, seed: str) -> list[list[int]]:
    """Prompts that no other seed gives."""
    rng = random.Random(seed)
    return [rng.choices(TOKEN_RANGE, k=tokens) for _ in range(count)]
