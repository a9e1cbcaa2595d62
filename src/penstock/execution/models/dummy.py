"""Random weights in the shape of a model, for measuring speed and memory without a checkpoint."""

from __future__ import annotations

import torch

from penstock.execution.models.decoder import CausalLM

# Random numbers are slow to draw, so one buffer is drawn and copied on and on. Its length is a prime: no two rows of a weight are equal.
_BUFFER_LENGTH = 1_000_003
_STD = 0.02


def fill_with_random_numbers(model: CausalLM, seed: int) -> None:
    """Normal numbers of standard deviation 0.02, the same for the same seed, such as the checkpoint's type can hold; norms get ones."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.empty(_BUFFER_LENGTH).normal_(std=_STD, generator=generator).to(model.config.dtype)
    offset = 0
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
            continue
        numbers = buffer.to(dtype=parameter.dtype, device=parameter.device)
        flat = parameter.data.view(-1)
        position = 0
        while position < len(flat):
            count = min(len(flat) - position, _BUFFER_LENGTH - offset)
            flat[position : position + count] = numbers[offset : offset + count]
            position += count
            offset = (offset + count) % _BUFFER_LENGTH
