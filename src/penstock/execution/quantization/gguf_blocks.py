"""The blocks of GGUF's quantised tensors, taken apart into codes, scales and offsets without changing a single weight.

A row is a sequence of blocks of 32 or 256 weights. The layouts are those of the structs in llama.cpp's ggml/src/ggml-common.h (MIT), the
meaning of each bit that of the dequantize_row functions in ggml/src/ggml-quants.c. `d` below is a float16 that scales the whole block:

    Q4_0 Q5_0 Q8_0     d * (q - zero)                 one scale for 32 weights
    Q4_1 Q5_1          d * q + m                      m: float16
    Q4_K Q5_K          d * s * q - dmin * m           s, m: 6 bits for 32 weights each, dmin: float16
    Q2_K               d * s * q - dmin * m           s, m: 4 bits for 16 weights each
    Q3_K Q6_K          d * s * (q - zero)             s: 6 or 8 bits, signed, for 16 weights
    IQ4_NL IQ4_XS      d * s * table[q]               s: 1, or 6 bits, signed, for 32 weights; table: 16 numbers of 8 bits

Codes of 5 and 6 bits and the numbers of the table are held as codes of 8 bits. Products of d with s or m are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Codes uint8 [B, values], scales float32 [B, groups], offsets like scales or None, of B blocks of bytes, uint8 [B, bytes].
Decoded = tuple[Tensor, Tensor, Tensor | None]

# kvalues_iq4nl of ggml-common.h.
_IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """`bits` of a code and weights that share a scale (`group_size`), as in QuantizedTensor, and what takes blocks apart."""

    bits: int
    group_size: int
    decode: Callable[[Tensor], Decoded]


def _decode_q4_0(blocks: Tensor) -> Decoded:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None


def _decode_q4_1(blocks: Tensor) -> Decoded:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2)


def _decode_q5_0(blocks: Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 6:], 16) | _bits(blocks[:, 2:6], 1) << 4
    return codes + (128 - 16), _half(blocks, 0), None


def _decode_q5_1(blocks: Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 8:], 16) | _bits(blocks[:, 4:8], 1) << 4
    return codes, _half(blocks, 0), -_half(blocks, 2)


def _decode_q8_0(blocks: Tensor) -> Decoded:
    # Adding 128 to a signed byte flips its sign bit.
    return blocks[:, 2:] ^ 0x80, _half(blocks, 0), None


def _decode_q2_k(blocks: Tensor) -> Decoded:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 0x0F)
    return _planes(blocks[:, 16:80], 2), scales, _half(blocks, 82) * (packed >> 4)


def _decode_q3_k(blocks: Tensor) -> Decoded:
    # The third bit is stored apart, and inverted: where it is 0, 4 is subtracted from the two others.
    codes = _planes(blocks[:, 32:96], 2) + (_planes(blocks[:, :32], 1) << 2) + (8 - 4)
    low = torch.cat((blocks[:, 96:104] & 0x0F, blocks[:, 96:104] >> 4), dim=1)
    high = torch.cat([blocks[:, 104:108] >> shift & 0x03 for shift in (0, 2, 4, 6)], dim=1)
    return codes, _half(blocks, 108) * ((low | high << 4).to(torch.float32) - 32), None


def _decode_q4_k(blocks: Tensor) -> Decoded:
    scales, offsets = _k_scales(blocks)
    return _nibbles(blocks[:, 16:], 32), scales, offsets


def _decode_q5_k(blocks: Tensor) -> Decoded:
    scales, offsets = _k_scales(blocks)
    return _nibbles(blocks[:, 48:], 32) | _planes(blocks[:, 16:48], 1) << 4, scales, offsets


def _decode_q6_k(blocks: Tensor) -> Decoded:
    codes = _nibbles(blocks[:, :128], 64) | _planes(blocks[:, 128:192], 2) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes + (128 - 32), _half(blocks, 208) * scales, None


def _decode_iq4_nl(blocks: Tensor) -> Decoded:
    return _iq4_codes(blocks[:, 2:]), _half(blocks, 0), None


def _decode_iq4_xs(blocks: Tensor) -> Decoded:
    low = _nibbles(blocks[:, 4:8], 1)
    high = _bits(blocks[:, 2:4], 2)
    return _iq4_codes(blocks[:, 8:]), _half(blocks, 0) * ((low | high << 4).to(torch.float32) - 32), None


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(4, 32, _decode_q4_0),
    "Q4_1": BlockFormat(4, 32, _decode_q4_1),
    "Q5_0": BlockFormat(8, 32, _decode_q5_0),
    "Q5_1": BlockFormat(8, 32, _decode_q5_1),
    "Q8_0": BlockFormat(8, 32, _decode_q8_0),
    "Q2_K": BlockFormat(4, 16, _decode_q2_k),
    "Q3_K": BlockFormat(4, 16, _decode_q3_k),
    "Q4_K": BlockFormat(4, 32, _decode_q4_k),
    "Q5_K": BlockFormat(8, 32, _decode_q5_k),
    "Q6_K": BlockFormat(8, 16, _decode_q6_k),
    "IQ4_NL": BlockFormat(8, 32, _decode_iq4_nl),
    "IQ4_XS": BlockFormat(8, 32, _decode_iq4_xs),
}


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [B, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """[B, 2 * n] of packed [B, n]: the low halves of `width` bytes, then their high halves, then the next `width` bytes."""
    parts = packed.reshape(len(packed), -1, 1, width)
    return torch.cat((parts & 0x0F, parts >> 4), dim=2).view(len(packed), -1)


def _planes(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits: the lowest bits of 32 bytes are 32 codes, then the next bits of the same bytes, then the next 32 bytes."""
    parts = packed.reshape(len(packed), -1, 1, 32)
    return _shifted(parts, bits, dim=2).view(len(packed), -1)


def _bits(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, one after the other from the lowest bit of the first byte on."""
    return _shifted(packed.unsqueeze(-1), bits, dim=-1).view(len(packed), -1)


def _shifted(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of `bits` bits in each byte, side by side along `dim`. (A shift by a tensor is 20 times slower than shifts by numbers.)"""
    return torch.cat([packed >> shift for shift in range(0, 8, bits)], dim=dim).bitwise_and_((1 << bits) - 1)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets, [B, 8] each, of Q4_K and Q5_K: d, dmin, and 12 bytes that hold 8 scales and 8 minima of 6 bits.

    Bytes 0 to 3: scales 0 to 3; 4 to 7: minima 0 to 3; 8 to 11: low halves of scales 4 to 7, high halves: of minima 4 to 7. Their upper
    two bits are those of bytes 0 to 7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 0x3F, third & 0x0F | first >> 2 & 0x30), dim=1)
    minima = torch.cat((second & 0x3F, third >> 4 | second >> 2 & 0x30), dim=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _iq4_codes(packed: Tensor) -> Tensor:
    table = torch.tensor([value + 128 for value in _IQ4_TABLE], dtype=torch.uint8)
    return table[_nibbles(packed, 16).to(torch.int32)]
