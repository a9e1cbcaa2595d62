"""The protocol of an attention backend, and the registry of those that exist.

A backend owns the layout of the KV cache: nobody else looks inside a KVCache. Backends hold nothing between calls but memory to work in,
so one object serves all layers, and two objects of one backend work on each other's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.attention.packages import installed_packages
from penstock.execution.kernels.native import native_available, unavailable_reason
from penstock.execution.kernels.triton.support import triton_runs_on, triton_unavailable_reason

if TYPE_CHECKING:
    from penstock.execution.attention.context import AttentionMetadata


@dataclass(frozen=True)
class KVCacheSpec:
    """What a KV cache of one layer has to hold: blocks of `block_size` tokens, with a key and a value of `head_dim` numbers for each of
    `num_kv_heads` heads. Keys may be kept in a wider type than values, because some models do not bear rounded keys."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer. The first dimension of all tensors is the block; the rest is the backend's.

    The scales belong to keys or values that are rounded to 8 bits; others have none."""

    key: Tensor
    value: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that moves with a block."""
        return [x for x in (self.key, self.value, self.key_scales, self.value_scales) if x is not None]

    @property
    def num_blocks(self) -> int:
        return self.key.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens of a block: keys are [num_blocks, block_size, KVH, D], or in tiles [num_blocks, KVH, block_size / tile, D, tile]."""
        shape = self.key.shape
        return shape[2] * shape[4] if len(shape) == 5 else shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Move(Protocol):
    """A whole block goes from `source` to `target`; the step boundary's BlockMove is one."""

    @property
    def source(self) -> int: ...

    @property
    def target(self) -> int: ...


class AttentionBackend(Protocol):
    """Attention over paged keys and values.

    T: query tokens of the step, H: query heads, KVH: key/value heads (H is a multiple), D: head size.
    """

    @property
    def name(self) -> str: ...

    @property
    def supports_graphs(self) -> bool:
        """Whether a decode step, whose metadata lies in buffers that keep their place, may be recorded once and replayed: nothing about it
        is decided by numbers on the host, a token with a negative slot is not written, a request without tokens gives zeros."""
        ...

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        """Why this backend cannot attend to such a cache with queries of type `arithmetic`; None when it can."""
        ...

    def allocate_kv_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Zeroed memory for one layer."""
        ...

    def allocate_host_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """The same layout in host memory, pinned when `device` copies faster from pinned memory."""
        ...

    def bytes_per_block(self, spec: KVCacheSpec) -> int:
        """Bytes of one block of one layer, keys, values and scales."""
        ...

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store key and value [T, KVH, D] at their slots."""
        ...

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Causal attention of query [T, H, D] over each request's context; returns [T, H, D].

        The step's own keys and values are already written. With `sliding_window` W, a token sees itself and the W - 1 before it.
        """
        ...

    def copy_blocks(self, kv_caches: Sequence[KVCache], source: Tensor, target: Tensor) -> None:
        """Copy blocks source[i] to target[i] (int64) within each layer's cache. No block is both a source and a target."""
        ...

    def swap_out(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        """Copy device blocks `source` to host blocks `target`, in every layer. Complete on return."""
        ...

    def swap_in(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        """Copy host blocks `source` to device blocks `target`, in every layer. Ordered before later work on the device."""
        ...


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm over each query and key head before it is rotated (Qwen3): weights [D] and epsilon."""

    query: Tensor
    key: Tensor
    eps: float


@runtime_checkable
class FusedAttentionBackend(AttentionBackend, Protocol):
    """A backend that normalises, rotates and stores in one pass over the projections."""

    def rotate_and_write(
        self,
        kv_cache: KVCache,
        heads: Tensor,
        *,
        table: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        norms: HeadNorms | None,
    ) -> Tensor:
        """heads [T, H + 2 * KVH, D] (query, key and value heads) → rotated queries [T, H, D]; rotated keys and values are stored at their
        slots. table: float32 [P, D], cosines and sines of each position (RotaryEmbedding.table); positions: int64 [T]."""
        ...


# Name → "module:class"; imported when chosen.
_BACKENDS = {
    "flash-attention": "penstock.execution.attention.flash_attention:FlashAttention",
    "flashinfer": "penstock.execution.attention.flashinfer:FlashInferAttention",
    "native": "penstock.execution.attention.native_paged:NativePagedAttention",
    "torch": "penstock.execution.attention.torch_paged:TorchPagedAttention",
    "triton": "penstock.execution.attention.triton_paged:TritonPagedAttention",
}

# Those whose attention comes from a package for GPUs; keys and values are written by our Triton kernels.
_FROM_PACKAGES = ("flash-attention", "flashinfer")

_CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def get_attention_backend(
    name: str,
    device: torch.device,
    *,
    spec: KVCacheSpec | None = None,
    arithmetic: torch.dtype | None = None,
    num_heads: int | None = None,
    graphs: bool = True,
) -> AttentionBackend:
    """The backend called `name`. 'auto' takes, of those made for `device` that can do a cache of `spec` with queries of type `arithmetic`,
    the fastest (choice.py says how that is found out, and logs it); torch's operators when none can or either is unknown.

    num_heads: query heads; without it 'auto' measures nothing. graphs: decode steps are to be recorded in CUDA graphs, where there are
    any. Raises ConfigError for an unknown name and for one that cannot run here.
    """
    if name == "auto":
        chosen = None
        if spec is not None and arithmetic is not None:
            chosen = _choose(device, spec, arithmetic, num_heads, graphs)
        return make_backend("torch") if chosen is None else chosen
    if name not in _BACKENDS:
        raise ConfigError(f"--attention-backend {name!r} is unknown; supported: auto, {', '.join(sorted(_BACKENDS))}.")
    if name == "native" and not (device.type == "cpu" and native_available()):
        reason = unavailable_reason() if device.type == "cpu" else "they run on a CPU only"
        raise ConfigError(f"--attention-backend native: there are no native CPU kernels ({reason}); use auto.")
    if name in _FROM_PACKAGES and device.type != "cuda":
        raise ConfigError(f"--attention-backend {name} runs on a GPU only; use auto.")
    if name in ("triton", *_FROM_PACKAGES) and not triton_runs_on(device):
        raise ConfigError(f"--attention-backend {name}: {triton_unavailable_reason(device)}; use auto.")
    try:
        return make_backend(name)
    except (ImportError, OSError, RuntimeError) as error:
        if name not in _FROM_PACKAGES:
            raise
        raise ConfigError(
            f"--attention-backend {name}: its package cannot be used ({type(error).__name__}: {error}); use auto."
        ) from error


def cache_spec(
    setting: str,
    arithmetic: torch.dtype,
    *,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    wide_keys: bool = False,
) -> KVCacheSpec:
    """The cache that the setting kv_cache_dtype means for a model that computes in `arithmetic`. wide_keys: keys stay in the type of the
    arithmetic where values are kept in 8 bits."""
    dtype = cache_dtype(setting, arithmetic)
    key_dtype = arithmetic if wide_keys and dtype.itemsize == 1 else dtype
    return KVCacheSpec(block_size, num_kv_heads, head_dim, key_dtype, dtype)


def cache_dtype(setting: str, arithmetic: torch.dtype) -> torch.dtype:
    """The type of the KV cache that the setting kv_cache_dtype means for a model that computes in `arithmetic`."""
    return arithmetic if setting == "auto" else _CACHE_DTYPES[setting]


def check_cache(backend: AttentionBackend, spec: KVCacheSpec, arithmetic: torch.dtype) -> None:
    """Raises ConfigError when `backend` cannot compute in `arithmetic` over such a cache."""
    reason = backend.unsupported(spec, arithmetic)
    if reason is not None:
        raise ConfigError(f"--attention-backend {backend.name} cannot do this KV cache: {reason}.")


def backend_class(name: str) -> Any:
    """The class of the backend called `name`, made without arguments. Raises whatever importing its module raises."""
    module_name, class_name = _BACKENDS[name].split(":")
    return getattr(import_module(module_name), class_name)


def make_backend(name: str) -> AttentionBackend:
    """A backend of the registry. Raises whatever the packages that it needs raise, and ConfigError when they are not there."""
    backend: AttentionBackend = backend_class(name)()
    return backend


def _choose(
    device: torch.device, spec: KVCacheSpec, arithmetic: torch.dtype, num_heads: int | None, graphs: bool
) -> AttentionBackend | None:
    """The backend made for `device` that `auto` takes; None when there is none."""
    if device.type == "cpu":
        native = make_backend("native") if native_available() else None
        return native if native is not None and native.unsupported(spec, arithmetic) is None else None
    # Imported here because both build on this module.
    from penstock.execution.attention.choice import choose_backend
    from penstock.execution.attention.stopwatch import DeviceStopwatch

    chosen = choose_backend(
        _preferred(device),
        device,
        spec,
        arithmetic,
        num_heads=num_heads,
        graphs=graphs,
        make_stopwatch=DeviceStopwatch,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what was measured with, and what backends that were not chosen held
    return chosen


def _preferred(device: torch.device) -> list[str]:
    """Backends for a GPU that may run on it: ours, then those whose packages are installed."""
    if not triton_runs_on(device):
        return []
    return ["triton", *sorted({package.backend for package in installed_packages()})]
