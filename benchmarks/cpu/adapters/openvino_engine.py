"""OpenVINO GenAI's continuous batching pipeline, which serves one request as well as many."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
import protocol

KV_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "u8"}
BLOCK_TOKENS = 32


class OpenVino:
    """settings: `model` (a folder of IR), `threads`, `kv_cache_dtype`, `kv_tokens`, `cache` (folder of compiled models)."""

    notes = ""

    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-settings["kv_tokens"] // BLOCK_TOKENS)
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = settings["max_num_batched_tokens"]
        scheduler.max_num_seqs = settings["max_num_seqs"]
        properties = {
            "INFERENCE_NUM_THREADS": settings["threads"],
            "KV_CACHE_PRECISION": KV_TYPES[settings["kv_cache_dtype"]],
        }
        if settings.get("cache"):
            properties["CACHE_DIR"] = settings["cache"]
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties)
        self.versions = {name: importlib.metadata.version(name) for name in ("openvino-genai", "optimum-intel")}

    def prepare(self, requests: int, tokens: int) -> None:
        """Nothing: one pipeline serves all sizes."""

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(inputs))
        return [len(result.m_generation_ids[0]) for result in results]


if __name__ == "__main__":
    protocol.serve(OpenVino)
