"""Where and how layers are built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.execution.attention.backend import AttentionBackend


@dataclass(frozen=True)
class LayerOptions:
    """Handed from the model down to every layer. `dtype` is the type of arithmetic and of stored weights."""

    dtype: torch.dtype
    device: torch.device
    attention_backend: AttentionBackend
