"""Cases of `penstock bench kernels`: paged attention over one layer, native beside torch's, decoding and prefilling."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from penstock.execution.attention.backend import AttentionBackend, KVCache, KVCacheSpec, get_attention_backend
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.measurement.timing import Case, Run, copies_needed, rotation

# Query heads, key/value heads, head size.
HEADS = {"tinyllama-1.1b": (32, 4, 64), "qwen2.5-0.5b": (14, 2, 64)}
# Name → (requests, tokens of context of each, how many of them are this step's).
STEPS = {"decode 1 x 1024": (1, 1024, 1), "decode 32 x 512": (32, 512, 1), "prefill 1 x 512": (1, 512, 512)}
KV_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
BLOCK_SIZE = 16


def attention_cases(model: str, kv_type: str) -> Iterator[Case]:
    """Every step of STEPS over a cache of this type. torch's attention is measured beside it for the types that it can store."""
    heads, kv_heads, head_dim = HEADS[model]
    for name, (requests, context, tokens) in STEPS.items():
        query = torch.randn(requests * tokens, heads, head_dim)
        native = get_attention_backend("native", torch.device("cpu"))
        reference: Run | None = None
        if kv_type != "int8":
            torch_backend = get_attention_backend("torch", torch.device("cpu"))
            reference = _run(torch_backend, query.to(KV_TYPES[kv_type]), (requests, context, tokens), kv_type, kv_heads)
        per_token = 2 * kv_heads * (head_dim * KV_TYPES[kv_type].itemsize + (4 if kv_type == "int8" else 0))
        seen = context - (tokens - 1) / 2
        yield Case(
            kernel=f"attention, {kv_type} KV",
            shape=f"{name}, {heads}/{kv_heads} heads",
            rows=requests * tokens,
            bytes_read=float(requests * context * per_token),
            operations=4.0 * requests * tokens * seen * heads * head_dim,
            arithmetic="float32",
            run=_run(native, query, (requests, context, tokens), kv_type, kv_heads),
            reference=reference,
            reference_name="torch backend",
        )


def _run(backend: AttentionBackend, query: Tensor, step: tuple[int, int, int], kv_type: str, kv_heads: int) -> Run:
    """Attention over one of several caches in turn."""
    requests, context, tokens = step
    head_dim = query.shape[2]
    blocks = context // BLOCK_SIZE
    dtype = KV_TYPES[kv_type]
    nbytes = requests * blocks * backend.bytes_per_block(KVCacheSpec(BLOCK_SIZE, kv_heads, head_dim, dtype, dtype))
    first = _filled(backend, requests * blocks, kv_heads, head_dim, dtype)
    copies = copies_needed(nbytes) if tokens == 1 else 1
    caches = [first, *(KVCache(*(t.clone() for t in first.tensors)) for _ in range(copies - 1))]
    metadata = step_metadata(requests, context, tokens)
    turn = rotation(caches)
    return lambda: backend.attend(query, next(turn), metadata, head_dim**-0.5, None)


def _filled(backend: AttentionBackend, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    spec = KVCacheSpec(BLOCK_SIZE, kv_heads, head_dim, dtype, dtype)
    cache = backend.allocate_kv_cache(blocks, spec, torch.device("cpu"))
    slots = torch.arange(blocks * BLOCK_SIZE)
    key, value = torch.randn(2, len(slots), kv_heads, head_dim).unbind()
    stored = torch.float32 if dtype == torch.int8 else dtype
    backend.write(cache, key.to(stored), value.to(stored), slots)
    return cache


def step_metadata(requests: int, context: int, tokens: int) -> AttentionMetadata:
    """A step of equal requests whose blocks lie one after the other; `context` is a multiple of the block size."""
    starts = np.arange(0, (requests + 1) * tokens, tokens, dtype=np.int32)
    lengths = np.full(requests, context, dtype=np.int32)
    tables = torch.arange(requests * context // BLOCK_SIZE, dtype=torch.int32).view(requests, -1)
    slots = [
        torch.arange(request * context + context - tokens, (request + 1) * context)
        for request, _ in enumerate(pairwise(starts))
    ]
    return AttentionMetadata(
        query_start=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lengths),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        num_decodes=requests if tokens == 1 else 0,
        query_start_host=starts,
        seq_lens_host=lengths,
        max_seq_len=context,
    )
