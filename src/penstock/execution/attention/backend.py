"""The protocol of an attention backend, and the registry of those that exist.

A backend owns the layout of the KV cache: nobody else looks inside a KVCache. Backends hold no state between calls, so one
object serves all layers, and two objects of one backend work on each other's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.kernels.attention import KV_KINDS, TILE_TOKENS
from penstock.execution.kernels.native import native_available, unavailable_reason

if TYPE_CHECKING:
    from penstock.execution.attention.context import AttentionMetadata


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer. The first dimension of all tensors is the block; the rest is the backend's.

    The scales belong to a cache of integers; others have none."""

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

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Zeroed memory for one layer."""
        ...

    def allocate_host_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """The same layout in host memory, pinned when `device` copies faster from pinned memory."""
        ...

    def bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer, keys and values."""
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


# Name → "module:class"; imported when chosen.
_BACKENDS = {
    "native": "penstock.execution.attention.native_paged:NativePagedAttention",
    "torch": "penstock.execution.attention.torch_paged:TorchPagedAttention",
}


_CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def get_attention_backend(
    name: str,
    device: torch.device,
    *,
    block_size: int | None = None,
    head_dim: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> AttentionBackend:
    """The backend called `name`; 'auto' takes the fastest for `device` that can do a cache of this block size, head size and type.

    Raises ConfigError for an unknown name, and for 'native' where it cannot be.
    """
    if name == "auto":
        fits = _native_fits(device, block_size, head_dim, kv_dtype)
        name = "native" if fits and native_available() else "torch"
    if name not in _BACKENDS:
        raise ConfigError(f"--attention-backend {name!r} is unknown; supported: auto, {', '.join(sorted(_BACKENDS))}.")
    if name == "native" and not native_available():
        raise ConfigError(
            f"--attention-backend native: there are no native CPU kernels ({unavailable_reason()}); use auto."
        )
    module_name, class_name = _BACKENDS[name].split(":")
    backend: AttentionBackend = getattr(import_module(module_name), class_name)()
    return backend


def cache_dtype(setting: str, arithmetic: torch.dtype) -> torch.dtype:
    """The type of the KV cache that the setting kv_cache_dtype means for a model that computes in `arithmetic`."""
    return arithmetic if setting == "auto" else _CACHE_DTYPES[setting]


def check_cache_dtype(backend: AttentionBackend, kv_dtype: torch.dtype, arithmetic: torch.dtype) -> None:
    """Raises ConfigError when `backend` cannot compute in `arithmetic` over a cache of `kv_dtype`."""
    if backend.name != "native" and kv_dtype != arithmetic:
        name, computed = (str(dtype).removeprefix("torch.") for dtype in (kv_dtype, arithmetic))
        raise ConfigError(
            f"--kv-cache-dtype {name} beside arithmetic in {computed} needs --attention-backend native (a CPU, native kernels, "
            f"--block-size a multiple of {TILE_TOKENS}), but the backend is {backend.name}; use auto."
        )


def _native_fits(
    device: torch.device, block_size: int | None, head_dim: int | None, kv_dtype: torch.dtype | None
) -> bool:
    """Whether the native kernels can do such a cache; not when anything about it is unknown."""
    if device.type != "cpu" or block_size is None or head_dim is None:
        return False
    return block_size % TILE_TOKENS == 0 and head_dim % 2 == 0 and kv_dtype in KV_KINDS
