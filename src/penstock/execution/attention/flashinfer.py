"""Attention by FlashInfer (Ye et al., 2025, arXiv:2501.01005), when the package flashinfer-python ≥ 0.2 is here.

Caches, writes and rotation are those of our Triton kernels; only `attend` differs. FlashInfer wants a plan for every step, made on the
host from the lengths of all requests, and runs it in every layer:

    wrapper                                  requests                        q rows
    BatchDecodeWithPagedKVCacheWrapper       the first num_decodes           one each
    BatchPrefillWithPagedKVCacheWrapper      the others                      query_start

A wrapper belongs to one kind of layer (window, scale, heads), keeps its last plan, and is planned again when a step comes that it has not
seen. Pages are flat lists:

    indptr     0     3  4     6        request r has the pages indices[indptr[r] : indptr[r + 1]],
    indices    7 2 9 | 4 | 1 5         the last of them holding last_page_len[r] tokens

Lengths come from the host's arrays. Pages are gathered on the device, from the block tables there, so that planning never waits for it.

Because each step is planned on the host, a CUDA graph would replay the plan of the step that it recorded: decode steps are launched kernel
by kernel. 16-bit queries over keys and values of the same type; heads of 64, 128 or 256 numbers; blocks of any size. In 8 bits FlashInfer
knows one scale per tensor, so that caches with a scale per token are not for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCache, KVCacheSpec
from penstock.execution.attention.blocks import zeroed
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.attention.packages import FLASHINFER, release
from penstock.execution.attention.triton_paged import TritonPagedAttention

# The first with plan and run in place of begin_forward and forward.
_OLDEST = (0, 2)
_HEAD_DIMS = (64, 128, 256)
# For partial results of contexts that are split over several programs; one buffer for all wrappers, which run one after the other.
_WORKSPACE_BYTES = 384 * 2**20


@dataclass(eq=False)
class PlannedWrapper:
    """A wrapper of FlashInfer, and the step that it is planned for: one whose metadata has the same `mark` in its plan.

    copied: reached when the device has read the pinned memory in which the last plan lies; until then nothing may be planned.
    """

    wrapper: Any
    mark: object = None
    copied: torch.cuda.Event | None = None

    def is_planned_for(self, metadata: AttentionMetadata) -> bool:
        return self.mark is not None and metadata.plan.get(self) is self.mark

    def wait_for_copy(self) -> None:
        """A plan is written into pinned memory and copied from there in the order of the stream. With steps that overlap, the copy of
        the step before may still wait for its turn: it has it as soon as the step before that one is done, so that this hardly ever
        waits."""
        if self.copied is not None:
            self.copied.synchronize()

    def planned(self, metadata: AttentionMetadata, device: torch.device) -> None:
        """The plan of this step was just made."""
        self.mark = metadata.plan[self] = object()
        if device.type == "cuda":
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(torch.cuda.current_stream(device))


@dataclass(frozen=True)
class Kind:
    """Layers that share a plan: they differ in nothing that FlashInfer plans for."""

    device: torch.device
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    sliding_window: int | None


@dataclass
class Wrappers:
    """The wrappers of one kind of layer."""

    decode: PlannedWrapper
    prefill: PlannedWrapper


@dataclass(frozen=True)
class Pages:
    """The pages of a step's requests; the description of the module draws them. indptr: [R+1] and last_page_len: [R] on the host,
    indices: [indptr[R]] on the device; all int32."""

    indptr: npt.NDArray[np.int32]
    last_page_len: npt.NDArray[np.int32]
    indices: Tensor

    def of(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """indptr (from zero), indices and last_page_len of the requests [first, end)."""
        indptr = self.indptr[first : end + 1]
        return (
            torch.from_numpy(indptr - indptr[0]),
            self.indices[int(indptr[0]) : int(indptr[-1])],
            torch.from_numpy(self.last_page_len[first:end].copy()),
        )


class FlashInferAttention(TritonPagedAttention):
    """See the module's description. Between calls it holds wrappers, which own memory on the device."""

    name = "flashinfer"
    supports_graphs = False

    def __init__(self, library: Any = None) -> None:
        """library: the module flashinfer; None imports it and raises ConfigError when it is not installed or too old."""
        super().__init__()
        self._library = installed_library() if library is None else library
        self._wrappers: dict[Kind, Wrappers] = {}
        self._workspaces: dict[torch.device, Tensor] = {}

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        """See AttentionBackend."""
        if arithmetic not in (torch.float16, torch.bfloat16):
            return f"FlashInfer computes in float16 or bfloat16, not in {_name(arithmetic)}"
        for dtype in (spec.key_dtype, spec.value_dtype):
            if dtype.itemsize == 1:
                return f"FlashInfer knows one scale for all {_name(dtype)} keys or values, this cache has one per token and head"
            if dtype != arithmetic:
                return f"FlashInfer reads keys and values in the type of queries, {_name(arithmetic)}, not in {_name(dtype)}"
        if spec.head_dim not in _HEAD_DIMS:
            return (
                f"FlashInfer has kernels for heads of {', '.join(map(str, _HEAD_DIMS))} numbers, not of {spec.head_dim}"
            )
        return super().unsupported(spec, arithmetic)

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        num_heads, head_dim = query.shape[1:]
        block_size, num_kv_heads = kv_cache.key.shape[1:3]
        kind = Kind(query.device, num_heads, num_kv_heads, head_dim, block_size, query.dtype, scale, sliding_window)
        wrappers = self._wrappers_of(kind)
        output = torch.empty_like(query)
        decodes = metadata.num_decodes
        cache = (kv_cache.key, kv_cache.value)
        if decodes:
            _plan_decodes(wrappers.decode, kind, metadata)
            wrappers.decode.wrapper.run(query[:decodes], cache, out=output[:decodes])
            if not metadata.seq_lens_host[:decodes].all():  # what comes out for a request without tokens is not defined
                output[:decodes].masked_fill_((metadata.seq_lens[:decodes] == 0)[:, None, None], 0)
        if decodes < metadata.num_requests:
            _plan_prefills(wrappers.prefill, kind, metadata)
            wrappers.prefill.wrapper.run(query[decodes:], cache, out=output[decodes:])
        return output

    def _wrappers_of(self, kind: Kind) -> Wrappers:
        wrappers = self._wrappers.get(kind)
        if wrappers is None:
            workspace = self._workspaces.get(kind.device)
            if workspace is None:
                # It has to be zero when it is first used.
                workspace = zeroed((_WORKSPACE_BYTES,), torch.uint8, kind.device)
                self._workspaces[kind.device] = workspace
            wrappers = Wrappers(
                # On tensor cores every ratio of heads works and grouped heads share what is read.
                decode=PlannedWrapper(
                    self._library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
                ),
                prefill=PlannedWrapper(self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")),
            )
            self._wrappers[kind] = wrappers
        return wrappers


def installed_library() -> Any:
    """The module flashinfer. Raises ConfigError when it is not installed or too old, and what its import raises."""
    if not FLASHINFER.installed:
        raise ConfigError(
            "--attention-backend flashinfer: the package flashinfer-python is not installed; install it or use auto."
        )
    module = import_module(FLASHINFER.module)
    version = str(getattr(module, "__version__", FLASHINFER.version))
    if release(version) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(
            f"--attention-backend flashinfer: flashinfer-python {version} is too old; {oldest} is needed."
        )
    return module


def _plan_decodes(planned: PlannedWrapper, kind: Kind, metadata: AttentionMetadata) -> None:
    """Plan for the step's decodes, unless that is what the wrapper is planned for."""
    if planned.is_planned_for(metadata):
        return
    planned.wait_for_copy()
    planned.wrapper.plan(
        *_pages(metadata, kind.block_size).of(0, metadata.num_decodes),
        kind.num_heads,
        kind.num_kv_heads,
        kind.head_dim,
        kind.block_size,
        **_options(kind),
    )
    planned.planned(metadata, kind.device)


def _plan_prefills(planned: PlannedWrapper, kind: Kind, metadata: AttentionMetadata) -> None:
    """Plan for the requests behind the decodes, unless that is what the wrapper is planned for."""
    if planned.is_planned_for(metadata):
        return
    planned.wait_for_copy()
    starts = metadata.query_start_host[metadata.num_decodes :]
    planned.wrapper.plan(
        torch.from_numpy(starts - starts[0]),
        *_pages(metadata, kind.block_size).of(metadata.num_decodes, metadata.num_requests),
        kind.num_heads,
        kind.num_kv_heads,
        kind.head_dim,
        kind.block_size,
        causal=True,
        **_options(kind),
    )
    planned.planned(metadata, kind.device)


def _options(kind: Kind) -> dict[str, Any]:
    """What both wrappers plan with. window_left: tokens before itself that a token sees; -1: all."""
    return {
        "window_left": -1 if kind.sliding_window is None else kind.sliding_window - 1,
        "sm_scale": kind.scale,
        "q_data_type": kind.dtype,
        "kv_data_type": kind.dtype,
    }


def _pages(metadata: AttentionMetadata, block_size: int) -> Pages:
    """The pages of the step's requests, gathered once per step."""
    pages: Pages | None = metadata.plan.get("flashinfer pages")
    if pages is None:
        lengths = metadata.seq_lens_host
        counts = -(-lengths // block_size)
        indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(counts, out=indptr[1:])
        # A request without tokens has no page, and nothing in the last one.
        last_page_len = (lengths - np.maximum(counts - 1, 0) * block_size).astype(np.int32)
        pages = Pages(indptr, last_page_len, _gather(metadata, block_size, int(indptr[-1])))
        metadata.plan["flashinfer pages"] = pages
    return pages


def _gather(metadata: AttentionMetadata, block_size: int, total: int) -> Tensor:
    """The first blocks of each row of the block tables that its tokens fill, one row after the other: int32 [total].

    `total` is known on the host, so that nothing asks the device how many there are."""
    lengths = metadata.seq_lens.to(torch.int64)
    counts = (lengths + block_size - 1) // block_size
    requests = torch.arange(len(counts), device=counts.device)
    rows = torch.repeat_interleave(requests, counts, output_size=total)
    columns = torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[rows]
    return metadata.block_tables[rows, columns]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
