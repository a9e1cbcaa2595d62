"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and the ways to stretch it to longer contexts.

A head vector of size D is split into halves (x1, x2); pair i is rotated by the angle position * inv_freq[i]:

    out = [x1 * cos - x2 * sin | x2 * cos + x1 * sin]

Keys are rotated once, before they enter the KV cache, so the rotation of a token may depend on its own position only. Every
type here does: chunked prefill, prefix reuse and recomputation all give the same keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_TYPES: tuple[str, ...] = get_args(RopeType)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Parameters of the rotation; the names are those of a Hugging Face config's `rope_parameters`.

    `original_max_position_embeddings` is the context length that the model was trained with before it was stretched by `factor`.
    The `*_freq_factor` belong to llama3, everything below them to yarn.
    """

    rope_type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


# Positions that a table starts with.
_FIRST_TABLE = 1024


class RotaryEmbedding(nn.Module):
    """Gives cosines and sines for positions; computed once per forward pass and shared by all layers.

    Returns (cos, sin), each [T, 1, D] in `dtype`. The sine of the first half is negated, as `apply_rotary` expects.

    With `dynamic` (NTK-aware) scaling, a token at position p beyond the original length L is rotated with the base
    theta * (factor * (p + 1) / L - (factor - 1)) ** (D / (D - 2)). That is what transformers does when it generates token by
    token with a cache. Within L the scaling has no effect. A prompt longer than L that transformers takes in one forward pass is
    rotated there with the base of its last token, so logits differ from ours for such prompts.
    """

    inv_freq: Tensor

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.dtype = dtype
        self.register_buffer("inv_freq", inverse_frequencies(config, head_dim).to(device), persistent=False)
        self.attention_factor = yarn_attention_factor(config) if config.rope_type == "yarn" else 1.0
        self._table = torch.empty(0, head_dim, device=device)

    def table(self, length: int) -> Tensor:
        """float32 [P, D] with P >= length: D/2 cosines, then D/2 sines of each position. Kept, and made longer when it must be."""
        if len(self._table) < length:
            size = max(_FIRST_TABLE, 1 << (length - 1).bit_length())
            cos, sin = self._angles(torch.arange(size, device=self.inv_freq.device))
            self._table = torch.cat((cos, sin), dim=-1)
        return self._table

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._angles(positions)
        cos = torch.cat((cos, cos), dim=-1).unsqueeze(1)
        sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1)
        return cos.to(self.dtype), sin.to(self.dtype)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, D/2] each."""
        position = positions.to(torch.float32).unsqueeze(-1)
        inv_freq = self._dynamic_frequencies(position) if self.config.rope_type == "dynamic" else self.inv_freq
        angle = position * inv_freq
        cos, sin = angle.cos(), angle.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos, sin

    def _dynamic_frequencies(self, position: Tensor) -> Tensor:
        """[T, D/2]: each token's own frequencies."""
        config, dim = self.config, self.head_dim
        length = (position + 1).clamp(min=config.original_max_position_embeddings)
        stretch = config.factor * length / config.original_max_position_embeddings - (config.factor - 1)
        base = config.theta * stretch ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
        return 1.0 / base**exponent


class Rotation:
    """The rotation of one step's tokens, shared by all layers.

    positions: int64 [T]. `cos_sin`: what `RotaryEmbedding` gives for them, computed when it is first asked for. `table`: cosines and sines
    of all positions up to the longest asked for so far, for kernels that look them up (see `RotaryEmbedding.table`); long enough for
    `positions` only if the model was prepared for its longest context.
    """

    def __init__(self, rotary: RotaryEmbedding, positions: Tensor) -> None:
        self.positions = positions
        self._rotary = rotary
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    @property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        if self._cos_sin is None:
            self._cos_sin = self._rotary(self.positions)
        return self._cos_sin

    @property
    def table(self) -> Tensor:
        return self._rotary.table(0)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by `RotaryEmbedding`'s cos and sin [T, 1, D]."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # [x2 | x1]
    return (x * cos).addcmul_(swapped, sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """float32 [D/2]: radians per position of each pair, scaling included (dynamic: as within the original length)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / config.theta**exponent
    if config.rope_type == "linear":
        return inv_freq / config.factor
    if config.rope_type == "llama3":
        return _llama3_frequencies(config, inv_freq)
    if config.rope_type == "yarn":
        return _yarn_frequencies(config, inv_freq, head_dim)
    return inv_freq


def _llama3_frequencies(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    length = config.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (length / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - smooth) * inv_freq / config.factor + smooth * inv_freq
    scaled = torch.where(wavelength > length / config.low_freq_factor, inv_freq / config.factor, blended)
    return torch.where(wavelength < length / config.high_freq_factor, inv_freq, scaled)


def _yarn_frequencies(config: RopeConfig, inv_freq: Tensor, head_dim: int) -> Tensor:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): pairs that turn often within the original length are kept
    (extrapolated), pairs that turn less than once are stretched (interpolated), with a linear ramp between."""

    def pair_with_rotations(rotations: float) -> float:
        length = config.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with_rotations(config.beta_fast), pair_with_rotations(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / config.factor * ramp + inv_freq * (1 - ramp)


def yarn_attention_factor(config: RopeConfig) -> float:
    """What cosines and sines are multiplied with, so that attention keeps its sharpness over a longer context."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
