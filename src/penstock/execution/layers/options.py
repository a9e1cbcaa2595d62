"""Where and how layers are built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.execution.attention.backend import AttentionBackend
from penstock.execution.parallel.groups import WHOLE_MODEL, ModelPart


@dataclass(frozen=True)
class LayerOptions:
    """Handed from the model down to every layer.

    dtype: the type of activations, and of weights that torch computes with. Float32 with native kernels.
    native: linear layers run on the native CPU kernels. triton: layers run on Triton kernels where there is one.
    weight_dtype: the type in which native layers keep float weights; None: as the checkpoint stores them, which loses
    nothing. widened_dtype: the type that native layers turn 8-bit floats and codebooks into. bf16_arithmetic: they may use the
    processor's bfloat16 units. part: what of the model this process holds. grouped: the layer is one of many alike, such as experts, that
    are computed together, so that on a GPU all of them keep their weights in the form that the grouped product reads.
    """

    dtype: torch.dtype
    device: torch.device
    attention_backend: AttentionBackend
    native: bool = False
    triton: bool = False
    weight_dtype: torch.dtype | None = None
    widened_dtype: torch.dtype = torch.float32
    bf16_arithmetic: bool = False
    part: ModelPart = WHOLE_MODEL
    grouped: bool = False
