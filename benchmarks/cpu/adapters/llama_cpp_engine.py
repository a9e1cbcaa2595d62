"""llama.cpp through the C interface that llama-cpp-python exposes: its high-level class decodes one sequence at a time.

Prompts are decoded in batches of up to 2,048 tokens (llama.cpp cuts them into pieces of 512), then one token of every sequence per step, as
in llama.cpp's own batched benchmark. Greedy tokens come from numpy, which is faster than a chain of samplers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import protocol

KV_TYPES = {"float32": 0, "float16": 1, "int8": 8, "bfloat16": 30}  # enum ggml_type
BATCH_TOKENS = 2048


class LlamaCpp:
    """settings: `model` (a GGUF file), `threads`, `kv_cache_dtype`."""

    notes = ""

    def __init__(self, settings: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._settings = settings
        path = settings["model"].encode()
        self._model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context: Any = None
        self._shape = (0, 0)
        self.versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}

    def prepare(self, requests: int, tokens: int) -> None:
        """A context of exactly this size: each sequence has memory of its own, which is llama.cpp's faster way to batch."""
        if self._shape == (requests, tokens):
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = requests
        params.n_ctx = (
            requests * (tokens + 255) // 256 * 256 if requests == 1 else requests * ((tokens + 255) // 256 * 256)
        )
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._settings["threads"]
        params.type_k = params.type_v = KV_TYPES[self._settings["kv_cache_dtype"]]
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {requests} x {tokens} tokens")
        self._shape = (requests, tokens)

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        newest: dict[int, int] = {}
        pending: list[tuple[int, int, int, bool]] = []
        for sequence, prompt in enumerate(prompts):
            if pending and len(pending) + len(prompt) > BATCH_TOKENS:
                newest |= self._decode(pending)
                pending = []
            last = len(prompt) - 1
            pending += [(token, position, sequence, position == last) for position, token in enumerate(prompt)]
        newest |= self._decode(pending)
        lengths = [len(prompt) for prompt in prompts]
        for step in range(output_tokens - 1):
            newest = self._decode([(token, lengths[s] + step, s, True) for s, token in newest.items()])
        return [output_tokens] * len(prompts)

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Decode (token, position, sequence, wants logits); the greedy next token of each sequence that wants one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return {sequence: self._greedy(i) for i, (_, _, sequence, wanted) in enumerate(tokens) if wanted}

    def _greedy(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size))
        return int(np.frombuffer(address.contents, np.float32).argmax())


if __name__ == "__main__":
    protocol.serve(LlamaCpp)
