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

if TYPE_CHECKING:
    from penstock.execution.attention.context import AttentionMetadata


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer. The first dimension of both is the block; the rest is the backend's."""

    key: Tensor
    value: Tensor

    @property
    def num_blocks(self) -> int:
        return self.key.shape[0]

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


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
    "torch": "penstock.execution.attention.torch_paged:TorchPagedAttention",
}


def get_attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend called `name`; 'auto' takes the fastest for `device`. Raises ConfigError for an unknown name."""
    if name == "auto":
        name = "torch"
    if name not in _BACKENDS:
        raise ConfigError(f"--attention-backend {name!r} is unknown; supported: auto, {', '.join(sorted(_BACKENDS))}.")
    module_name, class_name = _BACKENDS[name].split(":")
    backend: AttentionBackend = getattr(import_module(module_name), class_name)()
    return backend
