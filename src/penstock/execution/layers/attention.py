"""The attention layer: rotates a step's queries and keys, stores keys and values in the paged cache, attends to each request's context."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.execution.attention.backend import FusedAttentionBackend, HeadNorms, KVCache
from penstock.execution.attention.context import get_forward_context
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.rotary import Rotation, apply_rotary


class Attention(nn.Module):
    """Causal attention of layer `layer_index`, counted in this process, through the chosen backend.

    heads [T, H + 2 * KVH, D]: this rank's query, key and value heads as they are projected; returns [T, H * D]. With norms, every query
    and key head is normalised before it is rotated. Which tokens belong together and where the cache is comes from the forward context
    and from nowhere else. `sliding_window`: see AttentionBackend.attend.
    """

    def __init__(
        self,
        layer_index: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        sliding_window: int | None = None,
        options: LayerOptions,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_kv_heads = num_kv_heads
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self.backend = options.attention_backend
        self.fused = self.backend if isinstance(self.backend, FusedAttentionBackend) else None

    def forward(
        self, heads: Tensor, rotation: Rotation, q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None
    ) -> Tensor:
        context = get_forward_context()
        kv_cache = context.kv_caches[self.layer_index]
        slots = context.attention.slot_mapping
        if self.fused is None:
            query = self._rotate_and_write(kv_cache, heads, rotation, slots, q_norm, k_norm)
        else:
            norms = None
            if q_norm is not None and k_norm is not None:
                norms = HeadNorms(q_norm.weight.data, k_norm.weight.data, q_norm.eps)
            query = self.fused.rotate_and_write(
                kv_cache,
                heads,
                table=rotation.table,
                positions=rotation.positions,
                slot_mapping=slots,
                norms=norms,
            )
        attended = self.backend.attend(query, kv_cache, context.attention, self.scale, self.sliding_window)
        return attended.flatten(1)

    def _rotate_and_write(
        self,
        kv_cache: KVCache,
        heads: Tensor,
        rotation: Rotation,
        slots: Tensor,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
    ) -> Tensor:
        """The same in steps: rotated queries [T, H, D]."""
        num_heads = heads.shape[1] - 2 * self.num_kv_heads
        value = heads[:, -self.num_kv_heads :]
        if q_norm is None or k_norm is None:
            rotated = apply_rotary(heads[:, : -self.num_kv_heads], *rotation.cos_sin)  # queries and keys at once
            query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        else:
            query = apply_rotary(q_norm(heads[:, :num_heads]), *rotation.cos_sin)
            key = apply_rotary(k_norm(heads[:, num_heads : -self.num_kv_heads]), *rotation.cos_sin)
        self.backend.write(kv_cache, key, value, slots)
        return query
