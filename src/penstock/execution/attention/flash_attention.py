"""Attention by FlashAttention (Dao et al., 2022, 2023, 2024: arXiv:2205.14135, 2307.08691, 2407.08608), when one of its packages is here.

Caches, writes and rotation are those of our Triton kernels; only `attend` differs. Two generations have two packages:

    generation  package                                       GPUs                block size
    3           flash_attn_3 (module flash_attn_interface)    Hopper (9.0)        any
    2           flash-attn ≥ 2.6 (module flash_attn)          Ampere and newer    a multiple of 256

The third goes before the second where both could run. Both take 16-bit queries over keys and values of the same type, heads of up to
256 numbers that are a multiple of 8, and any sliding window. In 8 bits the third knows one scale per request and head and the second
none, so that caches with a scale per token are not for them.

Calls (arguments as in flash_attn/flash_attn_interface.py and hopper/flash_attn_interface.py of Dao-AILab/flash-attention):

    decodes only      flash_attn_with_kvcache(query [R, 1, H, D], cache, lengths, block table)           both generations
    anything else     the same with query [T, H, D] and query starts: one call for the whole step        generation 3
                      decodes as above, then flash_attn_varlen_func over the prefill chunks              generation 2

A decode takes nothing from the host but shapes (the number of splits follows from the width of the block table), so that it can be
recorded in a CUDA graph; a request with no tokens gives zeros, because a row that sees nothing is defined as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCache, KVCacheSpec
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.attention.packages import FLASH_ATTENTION_2, FLASH_ATTENTION_3, release
from penstock.execution.attention.triton_paged import TritonPagedAttention

# The first whose flash_attn_varlen_func takes a block table and that runs with a torch of today.
_OLDEST_2 = (2, 6)
_BLOCK_MULTIPLE_2 = 256
_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class FlashLibrary:
    """An imported package of FlashAttention. generation: 2 or 3."""

    generation: int
    name: str
    module: Any


class FlashAttention(TritonPagedAttention):
    """See the module's description."""

    name = "flash-attention"
    supports_graphs = True

    def __init__(self, library: FlashLibrary | None = None) -> None:
        """library: the one to use; None takes what is installed and raises ConfigError when that is nothing usable."""
        super().__init__()
        self.library = installed_library() if library is None else library

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        """See AttentionBackend."""
        if arithmetic not in (torch.float16, torch.bfloat16):
            return f"FlashAttention computes in float16 or bfloat16, not in {_name(arithmetic)}"
        for dtype in (spec.key_dtype, spec.value_dtype):
            if dtype != arithmetic:
                return f"FlashAttention reads keys and values in the type of queries, {_name(arithmetic)}, not in {_name(dtype)}"
        if spec.head_dim > _LARGEST_HEAD or spec.head_dim % _HEAD_MULTIPLE:
            return (
                f"FlashAttention takes heads of up to {_LARGEST_HEAD} numbers, in multiples of {_HEAD_MULTIPLE}, "
                f"not of {spec.head_dim}"
            )
        if self.library.generation == 2 and spec.block_size % _BLOCK_MULTIPLE_2:
            return (
                f"{self.library.name} reads blocks of a multiple of {_BLOCK_MULTIPLE_2} tokens, not of {spec.block_size} "
                f"(--block-size {_BLOCK_MULTIPLE_2})"
            )
        return super().unsupported(spec, arithmetic)

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        # A token sees itself and `left` tokens before it; -1: all of them.
        left = -1 if sliding_window is None else sliding_window - 1
        options = {"softmax_scale": scale, "causal": True, "window_size": (left, 0 if left >= 0 else -1)}
        decodes = metadata.num_decodes
        if decodes == metadata.num_requests:
            return self._decode(query, kv_cache, metadata, options)
        if self.library.generation == 3:
            attended: Tensor = self.library.module.flash_attn_with_kvcache(
                query,
                kv_cache.key,
                kv_cache.value,
                cache_seqlens=metadata.seq_lens,
                page_table=metadata.block_tables,
                cu_seqlens_q=metadata.query_start,
                max_seqlen_q=_longest_query(metadata),
                **options,
            )
            return attended
        if decodes == 0:
            return self._prefill(query, kv_cache, metadata, options)
        return torch.cat(
            [
                self._decode(query[:decodes], kv_cache, metadata, options),
                self._prefill(query[decodes:], kv_cache, metadata, options),
            ]
        )

    def _decode(self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, options: dict[str, Any]) -> Tensor:
        """The first requests of the step, one query token [H, D] each."""
        count = len(query)
        table = "page_table" if self.library.generation == 3 else "block_table"
        attended: Tensor = self.library.module.flash_attn_with_kvcache(
            query.unsqueeze(1),
            kv_cache.key,
            kv_cache.value,
            cache_seqlens=metadata.seq_lens[:count],
            **{table: metadata.block_tables[:count]},
            **options,
        )
        return attended.squeeze(1)

    def _prefill(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, options: dict[str, Any]
    ) -> Tensor:
        """The requests behind the decodes, with generation 2."""
        decodes = metadata.num_decodes
        query_starts, key_starts = _prefill_starts(metadata)
        attended: Tensor = self.library.module.flash_attn_varlen_func(
            query,
            kv_cache.key,
            kv_cache.value,
            cu_seqlens_q=query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=_longest_query(metadata),
            max_seqlen_k=metadata.max_seq_len,
            block_table=metadata.block_tables[decodes:],
            **options,
        )
        return attended


def installed_library() -> FlashLibrary:
    """The package for this GPU, imported. Raises ConfigError when there is none or it is too old, and what the import raises."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if hopper and FLASH_ATTENTION_3.installed:
        return FlashLibrary(3, str(FLASH_ATTENTION_3), import_module(FLASH_ATTENTION_3.module))
    if FLASH_ATTENTION_2.installed:
        module = import_module(FLASH_ATTENTION_2.module)
        version = str(getattr(module, "__version__", FLASH_ATTENTION_2.version))
        if release(version) < _OLDEST_2:
            oldest = ".".join(map(str, _OLDEST_2))
            raise ConfigError(
                f"--attention-backend flash-attention: flash-attn {version} is too old; {oldest} is needed."
            )
        return FlashLibrary(2, f"flash-attn {version}", module)
    also = " and flash_attn_3 runs on Hopper GPUs only" if FLASH_ATTENTION_3.installed else ""
    raise ConfigError(
        f"--attention-backend flash-attention: the package flash-attn is not installed{also}; install it or use auto."
    )


def _longest_query(metadata: AttentionMetadata) -> int:
    """Query tokens of the request that has most of them in this step."""
    longest: int | None = metadata.plan.get("longest query")
    if longest is None:
        longest = int(np.diff(metadata.query_start_host).max())
        metadata.plan["longest query"] = longest
    return longest


def _prefill_starts(metadata: AttentionMetadata) -> tuple[Tensor, Tensor]:
    """int32 [P+1] each, for the P requests behind the decodes: where their query tokens start, counted from the first of them, and where
    their keys would start if they lay one behind the other (the kernels take lengths from these). Made once per step, on the device."""
    starts: tuple[Tensor, Tensor] | None = metadata.plan.get("flash-attention starts")
    if starts is None:
        decodes = metadata.num_decodes
        keys = metadata.seq_lens[decodes:].cumsum(0, dtype=torch.int32)
        starts = metadata.query_start[decodes:] - decodes, F.pad(keys, (1, 0))
        metadata.plan["flash-attention starts"] = starts
    return starts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
