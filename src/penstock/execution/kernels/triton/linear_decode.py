"""What every kernel over packed weights shares: from words to numbers.

Integers become floats without a conversion, which is slow on a GPU: the code's bits go into the mantissa of 1.0,

    4 bits, odd planes:   v = 1 + code / 16       4 bits, even planes:  v = 1 + code / 256       8 bits:  v = 1 + code / 256

with one LOP3 each and, as two 4-bit planes share a shift, half a shift. `unit` says by what v is multiplied so that one code is one, and
`middle` what v is for the middle code, 8 or 128:

    weight = scale * unit * (v - middle) - offset

A multiply-add undoes it all, and a sum over a group needs it once: sum(x * weight) = scale * (sum(unit * x * v) - sum(unit * middle * x))
- offset * sum(x), where the second and third sum do not depend on the row. Differences of v are exact; the sums are of numbers up to 66
times larger than their difference, which costs six of float32's 24 bits.

8-bit floats are converted in hardware where it can (NATIVE_FLOAT8); elsewhere sign and seven bits are moved into a float16, whose
exponent is 8 larger, and multiplied by 256. Both are exact. Codebooks are looked up: 64 bytes, which stay in the first cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The bits of 1.0. Kernels get them as an argument: a LOP3 takes one constant, and this way the other comes from a register.
ONE_BITS = 0x3F800000


@triton.jit
def decode_plane(words, one_bits, codebook, plane: tl.constexpr, FORM: tl.constexpr, NATIVE_FLOAT8: tl.constexpr):
    """The numbers v of one plane of int32 words, float32 of the same shape."""
    if FORM == "int4":
        # Bits 19 to 22 hold the plane of an odd number, bits 15 to 18 the one below it.
        mask: tl.constexpr = 0x00780000 if plane % 2 == 1 else 0x00078000
        values = _in_mantissa(words, one_bits, 15 - 8 * (plane // 2), mask)
    elif FORM == "int8":
        values = _in_mantissa(words, one_bits, 15 - 8 * plane, 0x007F8000)
    elif FORM == "codebook":
        values = tl.load(codebook + ((words >> (4 * plane)) & 15))
    elif NATIVE_FLOAT8:
        values = (words >> (8 * plane)).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        byte = words >> (8 * plane)
        half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        values = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return values


@triton.jit
def _in_mantissa(words, one_bits, shift: tl.constexpr, mask: tl.constexpr):
    """1.0 with those bits of the word, shifted to the left, that are in the mask."""
    bits = words << shift if shift > 0 else words >> -shift
    return ((bits & mask) | one_bits).to(tl.float32, bitcast=True)


@triton.constexpr_function
def is_integer(form):
    """Whether v has a middle."""
    return form in ("int4", "int8")


@triton.constexpr_function
def num_planes(form):
    """Codes of one word."""
    return 8 if form in ("int4", "codebook") else 4


@triton.constexpr_function
def unit(form, plane):
    """What v is multiplied by so that one code is one."""
    if form == "int4":
        return 16.0 if plane % 2 == 1 else 256.0
    return 256.0 if form == "int8" else 1.0


@triton.constexpr_function
def middle(form, plane):
    """What v is for a weight of zero, offsets aside."""
    if form == "int4":
        return 1.5 if plane % 2 == 1 else 1.0 + 8.0 / 256.0
    return 1.5 if form == "int8" else 0.0


@triton.jit
def decode_tile(
    words,
    one_bits,
    codebook,
    scale,
    offset,
    RUN: tl.constexpr,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    """int32 words [N, W] → weights [N, W * planes] in DTYPE, features in their order. W: words of one span (RUN) or of several.

    scale, offset: float32, one for each word or row, multiplied and subtracted before the one rounding; None: the number is not scaled.
    """
    rows: tl.constexpr = words.shape[0]
    spans: tl.constexpr = words.shape[1] // RUN
    planes: tl.constexpr = num_planes(FORM)
    # Joining and transposing only rename registers; the planes of a span end up one after the other.
    quad = _four_planes(words, one_bits, codebook, scale, offset, 0, FORM, DTYPE, NATIVE_FLOAT8)
    if planes == 8:
        upper = _four_planes(words, one_bits, codebook, scale, offset, 4, FORM, DTYPE, NATIVE_FLOAT8)
        octet = tl.join(quad, upper).reshape(rows, spans, RUN, 2, 2, 2)
        tile = octet.permute(0, 1, 5, 4, 3, 2)
    else:
        tile = quad.reshape(rows, spans, RUN, 2, 2).permute(0, 1, 4, 3, 2)
    return tile.reshape(rows, words.shape[1] * planes).to(DTYPE)


@triton.jit
def _four_planes(
    words,
    one_bits,
    codebook,
    scale,
    offset,
    first: tl.constexpr,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    """Weights [N, W, 2, 2]; the last index is the upper bit of the plane's number."""
    lower = tl.join(
        _weight_plane(words, one_bits, codebook, scale, offset, first, FORM, DTYPE, NATIVE_FLOAT8),
        _weight_plane(words, one_bits, codebook, scale, offset, first + 1, FORM, DTYPE, NATIVE_FLOAT8),
    )
    upper = tl.join(
        _weight_plane(words, one_bits, codebook, scale, offset, first + 2, FORM, DTYPE, NATIVE_FLOAT8),
        _weight_plane(words, one_bits, codebook, scale, offset, first + 3, FORM, DTYPE, NATIVE_FLOAT8),
    )
    return tl.join(lower, upper)


@triton.jit
def _weight_plane(
    words,
    one_bits,
    codebook,
    scale,
    offset,
    plane: tl.constexpr,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    """One plane of weights [N, W]."""
    values = decode_plane(words, one_bits, codebook, plane, FORM, NATIVE_FLOAT8)
    if scale is None:
        if is_integer(FORM):
            values = values * unit(FORM, plane) - middle(FORM, plane) * unit(FORM, plane)
    else:
        multiplier = scale * unit(FORM, plane)
        values = values * multiplier
        if is_integer(FORM):
            values -= multiplier * middle(FORM, plane)
        if offset is not None:
            values -= offset
    return values
