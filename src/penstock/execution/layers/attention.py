"""The attention layer: stores a step's keys and values in the paged cache and attends to each request's context."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.execution.attention.context import get_forward_context
from penstock.execution.layers.options import LayerOptions


class Attention(nn.Module):
    """Causal attention of layer `layer_index` through the chosen backend.

    query [T, H, D], key and value [T, KVH, D], rotated already; returns [T, H * D]. Which tokens belong together and where the cache
    is comes from the forward context and from nowhere else. `sliding_window`: see AttentionBackend.attend.
    """

    def __init__(
        self, layer_index: int, head_dim: int, *, sliding_window: int | None = None, options: LayerOptions
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self.backend = options.attention_backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context = get_forward_context()
        kv_cache = context.kv_caches[self.layer_index]
        self.backend.write(kv_cache, key, value, context.attention.slot_mapping)
        attended = self.backend.attend(query, kv_cache, context.attention, self.scale, self.sliding_window)
        return attended.flatten(1)
