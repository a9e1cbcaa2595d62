"""Penstock in its own process, through the public `penstock.LLM`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import protocol

from penstock import LLM, SamplingParams


class Penstock:
    """settings: `model` and further fields of EngineConfig."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._llm = LLM(**settings)
        model = self._llm.model_info
        kernels = model.kernels or f"kernels of {model.device}"
        self.notes = (
            f"runs weights in {model.weights}, KV cache in {model.kv_cache_dtype}, {model.threads} threads, {kernels}"
        )
        self.versions = {name: importlib.metadata.version(name) for name in ("penstock", "torch")}

    def prepare(self, requests: int, tokens: int) -> None:
        """Nothing: one engine serves all sizes."""

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True)
        results = self._llm.generate(list(prompts), sampling)
        failures = [result.error for result in results if result.error is not None]
        if failures:
            raise failures[0]
        return [len(result.outputs[0].token_ids) for result in results]


if __name__ == "__main__":
    protocol.serve(Penstock)
