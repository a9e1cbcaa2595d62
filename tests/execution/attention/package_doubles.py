"""Stand-ins for FlashAttention and FlashInfer: their documented functions in torch, on a CPU.

Each refuses what the real ones refuse (types, shapes, strides, devices) and reads nothing but what its arguments say. Sources:
flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp and hopper/flash_api.cpp of Dao-AILab/flash-attention;
flashinfer/decode.py and flashinfer/prefill.py of flashinfer-ai/flashinfer.
"""

from __future__ import annotations

import importlib.machinery
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Refused(Exception):
    """An argument that the real package would refuse."""


def check(condition: bool, text: str) -> None:
    if not condition:
        raise Refused(text)


def check_indices(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    check(tensor.dtype == torch.int32, f"{name} must be int32")
    check(tensor.is_contiguous(), f"{name} must be contiguous")
    check(tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}")


def masked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, left: int) -> Tensor:
    """query [S, H, D] are the last tokens of the context key, value [N, KVH, D]; left: tokens before itself that one sees, -1: all.

    A row that sees nothing is zero."""
    rows, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    positions = torch.arange(rows) + len(key) - rows
    columns = torch.arange(len(key))
    hidden = torch.zeros(rows, len(key), dtype=torch.bool)
    if causal:
        hidden |= columns > positions[:, None]
    if left >= 0:
        hidden |= columns < positions[:, None] - left
    key, value = (x.repeat_interleave(group, dim=1).float() for x in (key, value))
    scores = torch.einsum("shd,nhd->hsn", query.float(), key) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hsn,nhd->shd", weights, value).to(query.dtype)


def gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the blocks: [length, KVH, D]."""
    needed = blocks[: -(-length // cache.shape[1])].long()
    return cache[needed].flatten(0, 1)[:length]


def _check_cache(query: Tensor, key: Tensor, value: Tensor, block_multiple: int) -> None:
    check(query.dtype in HALF, "only fp16 and bf16")
    check(query.dtype == key.dtype == value.dtype, "query and key must have the same dtype")
    check(all(x.stride(-1) == 1 for x in (query, key, value)), "the last dimension must be contiguous")
    check(key.dim() == 4 and key.shape == value.shape, "the cache is [num_blocks, block_size, KVH, D]")
    check(key.shape[1] % block_multiple == 0, f"block size must be divisible by {block_multiple}")
    check(query.shape[-1] == key.shape[-1] <= 256 and query.shape[-1] % 8 == 0, "head size")
    check(query.shape[-2] % key.shape[-2] == 0, "heads must be a multiple of key heads")


def _check_table(table: Tensor, requests: int) -> None:
    check(table.dtype == torch.int32, "block_table must be int32")
    check(table.stride(-1) == 1, "block_table must have contiguous last dimension")
    check(table.shape[0] == requests, "batch_size must be equal to batch_size_k")


class FlashDouble:
    """The modules flash_attn (generation 2) and flash_attn_interface (generation 3). `calls`: what was called, with how many requests."""

    def __init__(self, generation: int, version: str = "2.8.3") -> None:
        self.generation = generation
        self.calls: list[tuple[str, int]] = []
        name = "flash_attn" if generation == 2 else "flash_attn_interface"
        self.module = types.ModuleType(name)
        self.module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.module.__dict__["flash_attn_with_kvcache"] = self._kvcache_2 if generation == 2 else self._kvcache_3
        if generation == 2:
            self.module.__dict__["__version__"] = version
            self.module.__dict__["flash_attn_varlen_func"] = self._varlen_2

    def _kvcache_2(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        self.calls.append(("kvcache", len(q)))
        _check_cache(q, k_cache, v_cache, 256)
        return self._batched(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal, window_size)

    def _kvcache_3(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        softmax_scale: float,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        _check_cache(q, k_cache, v_cache, 1)
        if cu_seqlens_q is None:
            self.calls.append(("kvcache", len(q)))
            return self._batched(q, k_cache, v_cache, cache_seqlens, page_table, softmax_scale, causal, window_size)
        requests = len(cu_seqlens_q) - 1
        self.calls.append(("kvcache varlen", requests))
        check(q.dim() == 3, "with cu_seqlens_q the query is [total, H, D]")
        check_indices(cu_seqlens_q, (requests + 1,), "cu_seqlens_q")
        check_indices(cache_seqlens, (requests,), "cache_seqlens")
        _check_table(page_table, requests)
        check(max_seqlen_q == int(cu_seqlens_q.diff().max()), "max_seqlen_q")
        return self._varlen(
            q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, causal, window_size
        )

    def _varlen_2(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        block_table: Tensor,
    ) -> Tensor:
        requests = len(cu_seqlens_q) - 1
        self.calls.append(("varlen", requests))
        _check_cache(q, k, v, 256)
        check(q.dim() == 3 and len(q) == int(cu_seqlens_q[-1]), "the query is [total, H, D]")
        for name, starts, longest in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
            check_indices(starts, (requests + 1,), f"cu_seqlens_{name}")
            check(int(starts[0]) == 0, f"cu_seqlens_{name} starts at zero")
            check(longest >= int(starts.diff().max()), f"max_seqlen_{name}")
        _check_table(block_table, requests)
        lengths = cu_seqlens_k.diff()
        return self._varlen(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, causal, window_size)

    @staticmethod
    def _batched(
        q: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor,
        table: Tensor,
        scale: float,
        causal: bool,
        window: tuple[int, int],
    ) -> Tensor:
        check(q.dim() == 4, "the query is [batch, tokens, H, D]")
        check_indices(lengths, (len(q),), "cache_seqlens")
        _check_table(table, len(q))
        return torch.stack(
            [
                masked_attention(
                    query, gather(key, blocks, length), gather(value, blocks, length), scale, causal, window[0]
                )
                for query, blocks, length in zip(q, table, lengths.tolist(), strict=True)
            ]
        )

    @staticmethod
    def _varlen(
        q: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        lengths: Tensor,
        table: Tensor,
        scale: float,
        causal: bool,
        window: tuple[int, int],
    ) -> Tensor:
        return torch.cat(
            [
                masked_attention(
                    query, gather(key, blocks, length), gather(value, blocks, length), scale, causal, window[0]
                )
                for query, blocks, length in zip(
                    torch.split(q, starts.diff().tolist()), table, lengths.tolist(), strict=True
                )
            ]
        )


@dataclass
class Planned:
    """What a wrapper of FlashInfer keeps of its last plan."""

    query_starts: list[int]
    indptr: list[int]
    indices: Tensor
    last_page_len: list[int]
    heads: tuple[int, int, int]
    page_size: int
    causal: bool
    window_left: int
    sm_scale: float
    dtypes: tuple[torch.dtype, torch.dtype]


class _Wrapper:
    """What both wrappers do. `plans` counts."""

    def __init__(self, workspace: Tensor, kv_layout: str = "NHD") -> None:
        check(workspace.dtype == torch.uint8 and workspace.numel() >= 128 * 2**20, "the workspace is 128 MiB of bytes")
        check(kv_layout == "NHD", "only this layout is stood in for")
        self.device = workspace.device
        self.state: Planned | None = None
        self.plans = 0

    def _plan(self, query_starts: Tensor, pages: tuple[Tensor, ...], page_size: int, **rest: Any) -> None:
        indptr, indices, last_page_len = pages
        requests = len(last_page_len)
        for name, tensor in (("qo_indptr", query_starts), ("indptr", indptr), ("last_page_len", last_page_len)):
            check_indices(tensor, (requests if name == "last_page_len" else requests + 1,), name)
            check(tensor.device.type == "cpu", f"{name} would be copied to the host")
        check_indices(indices, (int(indptr[-1]),), "indices")
        check(indices.device == self.device, "indices would be copied to the device")
        check(int(indptr[0]) == 0 and int(query_starts[0]) == 0, "starts begin at zero")
        for pages_of_request, last in zip(indptr.diff().tolist(), last_page_len.tolist(), strict=True):
            check(1 <= last <= page_size if pages_of_request else last == 0, "last_page_len")
        self.plans += 1
        self.state = Planned(
            query_starts.tolist(), indptr.tolist(), indices, last_page_len.tolist(), page_size=page_size, **rest
        )

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        state = self.state
        if state is None:
            raise Refused("run before plan")
        key, value = paged_kv_cache
        check((q.dtype, key.dtype) == state.dtypes and value.dtype == key.dtype, "types differ from the plan's")
        check((q.shape[1], key.shape[2], q.shape[2]) == state.heads, "heads differ from the plan's")
        check(key.shape == value.shape and key.shape[1] == state.page_size, "pages differ from the plan's")
        check(len(q) == state.query_starts[-1], "q.shape[0] does not match qo_indptr[-1]")
        check(out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), "out")
        for request, last in enumerate(state.last_page_len):
            rows = slice(*state.query_starts[request : request + 2])
            first, end = state.indptr[request : request + 2]
            length = max(end - first - 1, 0) * state.page_size + last
            blocks = state.indices[first:end]
            if length == 0:
                out[rows] = torch.nan  # nothing is documented for it
                continue
            out[rows] = masked_attention(
                q[rows],
                gather(key, blocks, length),
                gather(value, blocks, length),
                state.sm_scale,
                state.causal,
                state.window_left,
            )
        return out


class FlashInferDouble:
    """The module flashinfer. `wrappers`: all that were made."""

    def __init__(self, version: str = "0.6.1") -> None:
        self.wrappers: list[_Wrapper] = []
        made = self.wrappers

        class Decode(_Wrapper):
            def __init__(self, workspace: Tensor, kv_layout: str = "NHD", *, use_tensor_cores: bool = False) -> None:
                super().__init__(workspace, kv_layout)
                check(use_tensor_cores, "without tensor cores only some ratios of heads exist")
                made.append(self)

            def plan(
                self,
                indptr: Tensor,
                indices: Tensor,
                last_page_len: Tensor,
                num_qo_heads: int,
                num_kv_heads: int,
                head_dim: int,
                page_size: int,
                *,
                window_left: int = -1,
                q_data_type: torch.dtype = torch.float16,
                kv_data_type: torch.dtype | None = None,
                sm_scale: float | None = None,
            ) -> None:
                self._plan(
                    torch.arange(len(last_page_len) + 1, dtype=torch.int32),
                    (indptr, indices, last_page_len),
                    page_size,
                    heads=(num_qo_heads, num_kv_heads, head_dim),
                    causal=False,
                    window_left=window_left,
                    sm_scale=head_dim**-0.5 if sm_scale is None else sm_scale,
                    dtypes=(q_data_type, q_data_type if kv_data_type is None else kv_data_type),
                )

        class Prefill(_Wrapper):
            def __init__(self, workspace: Tensor, kv_layout: str = "NHD") -> None:
                super().__init__(workspace, kv_layout)
                made.append(self)

            def plan(
                self,
                qo_indptr: Tensor,
                paged_kv_indptr: Tensor,
                paged_kv_indices: Tensor,
                paged_kv_last_page_len: Tensor,
                num_qo_heads: int,
                num_kv_heads: int,
                head_dim_qk: int,
                page_size: int,
                *,
                causal: bool = False,
                window_left: int = -1,
                q_data_type: torch.dtype = torch.float16,
                kv_data_type: torch.dtype | None = None,
                sm_scale: float | None = None,
            ) -> None:
                self._plan(
                    qo_indptr,
                    (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
                    page_size,
                    heads=(num_qo_heads, num_kv_heads, head_dim_qk),
                    causal=causal,
                    window_left=window_left,
                    sm_scale=head_dim_qk**-0.5 if sm_scale is None else sm_scale,
                    dtypes=(q_data_type, q_data_type if kv_data_type is None else kv_data_type),
                )

        self.module = types.ModuleType("flashinfer")
        self.module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
        self.module.__dict__["__version__"] = version
        self.module.__dict__["BatchDecodeWithPagedKVCacheWrapper"] = Decode
        self.module.__dict__["BatchPrefillWithPagedKVCacheWrapper"] = Prefill

    @property
    def plans(self) -> int:
        return sum(wrapper.plans for wrapper in self.wrappers)
