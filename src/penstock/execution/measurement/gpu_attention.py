"""Cases of the GPU benchmark: paged attention of one layer, prefill beside SDPA, decode against the time that its bytes take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from penstock.execution.kernels.triton.attention import paged_attention, paged_attention_twin
from penstock.execution.measurement.gpu_timing import (
    GPUCase,
    IndexedRun,
    arithmetic_of,
    copies_for,
    relative_error,
    tolerance_of,
)

BLOCK_SIZE = 16
KV_TYPES = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
SCALE_BYTES = 4
# The twin computes on the host in float64: what is longer than this is compared otherwise or not at all.
MOST_TWIN_PRODUCTS = 2**31
# The textbook's attention writes all scores; above this many tokens they take gigabytes.
MOST_WRITTEN_TOKENS = 4096


@dataclass(frozen=True)
class Heads:
    """Of one layer."""

    query: int
    kv: int
    size: int


@dataclass(frozen=True)
class _Cache:
    """Keys and values of one layer, all blocks of a request one after the other in memory, requests in turn."""

    key: Tensor
    value: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    @property
    def nbytes(self) -> int:
        tensors = (self.key, self.value, self.key_scales, self.value_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class _Step:
    """What the kernel is told about requests."""

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    num_decodes: int


def decode_case(
    heads: Heads, requests: int, context: int, kv_type: str, dtype: torch.dtype, device: torch.device
) -> GPUCase:
    """One new token for each of `requests` with `context` tokens each, over a cache of a type of KV_TYPES."""
    first = _cache(heads, requests * context, KV_TYPES[kv_type] or dtype, device)
    copies = copies_for(first.nbytes)
    caches = [first, *(_cache(heads, requests * context, first.key.dtype, device) for _ in range(copies - 1))]
    query = torch.randn(requests, heads.query, heads.size, device=device).to(dtype)
    step = _step(requests, context, 1, device)
    return GPUCase(
        kernel=f"decode attention, {kv_type} KV",
        shape=f"{requests} x {context}, {heads.query}/{heads.kv} heads of {heads.size}",
        rows=requests,
        bytes_moved=float(first.nbytes + 2 * query.nbytes),
        operations=4.0 * requests * context * heads.query * heads.size,
        arithmetic=arithmetic_of(dtype),
        copies=copies,
        run=lambda copy: _attend(query, caches[copy], step),
        error=_error(query, first, step, requests * context * heads.query * heads.size),
        tolerance=tolerance_of(dtype),
    )


def prefill_case(heads: Heads, tokens: int, dtype: torch.dtype, device: torch.device) -> GPUCase:
    """One prompt of `tokens`, causal, beside SDPA with its flash kernel, as torch chooses, and the textbook's three operators."""
    cache = _cache(heads, tokens, dtype, device)
    query = torch.randn(tokens, heads.query, heads.size, device=device).to(dtype)
    step = _step(1, tokens, tokens, device)
    products = heads.query * heads.size * tokens * (tokens + 1) / 2
    return GPUCase(
        kernel="prefill attention",
        shape=f"1 x {tokens}, {heads.query}/{heads.kv} heads of {heads.size}",
        rows=tokens,
        bytes_moved=float(cache.nbytes + 2 * query.nbytes),
        operations=4.0 * products,
        arithmetic=arithmetic_of(dtype),
        copies=1,
        run=lambda _: _attend(query, cache, step),
        references=_sdpa(query, cache, tokens),
        error=_error(query, cache, step, products) or _error_beside_sdpa(query, cache, step, tokens),
        tolerance=tolerance_of(dtype),
    )


def _sdpa(query: Tensor, cache: _Cache, tokens: int) -> dict[str, IndexedRun]:
    """The same through torch; keys and values lie as they do in the cache, [1, KVH, T, D] seen from outside."""
    q = query.transpose(0, 1).unsqueeze(0)
    key, value = (
        cached.flatten(0, 1)[:tokens].transpose(0, 1).unsqueeze(0).contiguous() for cached in (cache.key, cache.value)
    )
    q = q.contiguous()
    group = q.shape[1] // key.shape[1]

    def flash(_: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)

    def chosen(_: int) -> Tensor:
        return F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)

    def written(_: int) -> Tensor:
        scores = q @ key.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu_(1)
        return torch.matmul(scores.masked_fill_(hidden, -math.inf).softmax(-1), value.repeat_interleave(group, 1))

    runs: dict[str, IndexedRun] = {"SDPA flash": flash, "SDPA": chosen}
    if tokens <= MOST_WRITTEN_TOKENS:
        runs["written out"] = written
    return runs


def _attend(query: Tensor, cache: _Cache, step: _Step) -> Tensor:
    return paged_attention(
        query,
        cache.key,
        cache.value,
        cache.key_scales,
        cache.value_scales,
        query_start=step.query_start,
        seq_lens=step.seq_lens,
        block_tables=step.block_tables,
        num_decodes=step.num_decodes,
        scale=query.shape[2] ** -0.5,
        sliding_window=None,
    )


def _error(query: Tensor, cache: _Cache, step: _Step, products: float) -> Callable[[], float] | None:
    """Distance from the twin; None where the twin would take minutes."""
    if products > MOST_TWIN_PRODUCTS:
        return None

    def error() -> float:
        expected = paged_attention_twin(
            query,
            cache.key,
            cache.value,
            cache.key_scales,
            cache.value_scales,
            query_start=step.query_start,
            seq_lens=step.seq_lens,
            block_tables=step.block_tables,
            scale=query.shape[2] ** -0.5,
            sliding_window=None,
            compute=torch.float32,
        )
        return relative_error(_attend(query, cache, step).cpu(), expected)

    return error


def _error_beside_sdpa(query: Tensor, cache: _Cache, step: _Step, tokens: int) -> Callable[[], float]:
    """Distance from torch's attention in float32 on the device, for prompts that are too long for the twin."""

    def error() -> float:
        group = query.shape[1] // cache.key.shape[2]
        key, value = (cached.flatten(0, 1)[:tokens].float() for cached in (cache.key, cache.value))
        expected = F.scaled_dot_product_attention(
            query.float().transpose(0, 1).unsqueeze(0),
            key.repeat_interleave(group, 1).transpose(0, 1).unsqueeze(0),
            value.repeat_interleave(group, 1).transpose(0, 1).unsqueeze(0),
            is_causal=True,
        )
        return relative_error(_attend(query, cache, step), expected[0].transpose(0, 1))

    return error


def _cache(heads: Heads, tokens: int, dtype: torch.dtype, device: torch.device) -> _Cache:
    shape = (-(-tokens // BLOCK_SIZE), BLOCK_SIZE, heads.kv, heads.size)
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return _Cache(_random(shape, device).to(dtype), _random(shape, device).to(dtype), None, None)
    largest = 127.0 if dtype == torch.int8 else 448.0
    rounded = [(_random(shape, device) * (largest / 4)).clamp_(-largest, largest).to(dtype) for _ in range(2)]
    scales = [torch.rand(shape[:3], device=device).add_(0.5).mul_(4 / largest) for _ in range(2)]
    return _Cache(rounded[0], rounded[1], scales[0], scales[1])


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def _step(requests: int, context: int, tokens: int, device: torch.device) -> _Step:
    blocks = -(-context // BLOCK_SIZE)
    return _Step(
        torch.arange(0, (requests + 1) * tokens, tokens, dtype=torch.int32, device=device),
        torch.full((requests,), context, dtype=torch.int32, device=device),
        torch.arange(requests * blocks, dtype=torch.int32, device=device).view(requests, blocks),
        requests if tokens == 1 else 0,
    )
