"""Rotating, normalising, rounding and storing heads, against the same in torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.triton import cache_write
from penstock.execution.kernels.triton.attention import read_cached
from penstock.execution.kernels.triton.cache_write import rotate_and_write, rotate_and_write_twin, write, write_twin

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Half a step of the 8-bit numbers, as a part of a head's largest number.
ROUNDING = {torch.int8: 0.5 / 127, FP8: 1 / 16}
Caches = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def make_caches(
    kv_heads: int, dim: int, dtype: torch.dtype, key: torch.dtype, value: torch.dtype, device: torch.device
) -> Caches:
    """Zeros; six blocks of 16 tokens."""
    size = (6, 16, kv_heads, dim)
    caches = [torch.zeros(size, device=device).to(x) for x in (key, value)]
    scales = [None if x == dtype else torch.zeros(size[:3], device=device) for x in (key, value)]
    return caches[0], caches[1], scales[0], scales[1]


def contents(caches: Caches) -> list[Tensor]:
    """Keys and values as numbers, [96, KVH, D]."""
    every = torch.arange(6, device=caches[0].device)
    return [read_cached(cache, scales, every) for cache, scales in ((caches[0], caches[2]), (caches[1], caches[3]))]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norms", "dtype"),
    [
        *((4, 2, 64, False, dtype) for dtype in DTYPES),
        *((7, 1, 32, True, dtype) for dtype in DTYPES),
        (9, 3, 80, True, torch.float32),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_rotate_and_write(
    heads: int,
    kv_heads: int,
    dim: int,
    norms: bool,
    dtype: torch.dtype,
    together: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every head alone or several in a program; tokens with negative slots leave no trace but have their query rotated."""
    if together:
        monkeypatch.setattr(cache_write, "_SEPARATE_HEADS", 0)
    tokens = 5
    torch.manual_seed(dim)
    projected = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    slots = torch.full((tokens,), -1, device=device)
    slots[::2] = torch.randperm(96, device=device)[: len(slots[::2])]
    q_norm, k_norm = (torch.rand(2, dim, device=device) + 0.5).to(dtype).unbind() if norms else (None, None)
    ours, twins = (make_caches(kv_heads, dim, dtype, dtype, dtype, device) for _ in range(2))
    arguments = {
        "table": torch.randn(50, dim, device=device),
        "positions": torch.randint(50, (tokens,), device=device),
        "slot_mapping": slots,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": 1e-5,
    }
    query = rotate_and_write(projected, *ours, **arguments)  # type: ignore[arg-type]
    expected = rotate_and_write_twin(projected, *twins, **arguments)  # type: ignore[arg-type]
    assert (query.dtype, query.shape) == (dtype, (tokens, heads, dim))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(query, expected, atol=tolerance, rtol=tolerance)
    for actual, wanted in zip(contents(ours), contents(twins), strict=True):
        torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=tolerance)
    assert int(contents(ours)[0].any(-1).any(-1).sum()) == int((slots >= 0).sum())


@pytest.mark.parametrize("value_dtype", [torch.int8, FP8])
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.int8, FP8])
def test_rounded_rows_are_as_near_as_they_can_be(
    key_dtype: torch.dtype, value_dtype: torch.dtype, device: torch.device
) -> None:
    """Half a step at most; a head of zeros is zeros; the scale is the largest number over the limit."""
    torch.manual_seed(3)
    rows = torch.randn(2, 6, 3, 48, device=device) * torch.logspace(-4, 4, 6, device=device)[:, None, None]
    rows[:, 2, 1] = 0
    slots = torch.tensor([5, 90, 17, 33, -1, 34], device=device)
    caches = make_caches(3, 48, torch.float32, key_dtype, value_dtype, device)
    write(rows[0], rows[1], *caches, slots)
    stored = slots >= 0
    for number, dtype in enumerate((key_dtype, value_dtype)):
        original, actual = rows[number][stored], contents(caches)[number][slots[stored]]
        if dtype == torch.float32:
            assert torch.equal(actual, original)
            continue
        largest = original.abs().amax(-1, keepdim=True)
        bound = largest * ROUNDING[dtype]
        if dtype == FP8:
            # A float's step is a part of itself, down to the smallest ones.
            bound = (original.abs() * ROUNDING[dtype]).maximum(largest / 448 * 2**-10)
        assert ((actual - original).abs() <= bound * 1.001).all()
        assert not actual[2, 1].any()
        scales = caches[2 + number]
        assert scales is not None
        limit = 127 if dtype == torch.int8 else 448
        torch.testing.assert_close(scales.flatten(0, 1)[slots[stored]] * limit, largest.squeeze(-1))
    untouched = torch.ones(96, dtype=torch.bool)
    untouched[slots[stored].cpu()] = False
    assert not contents(caches)[1].cpu()[untouched].any()


def test_8_bit_floats_are_rounded_to_even(device: torch.device) -> None:
    """Exactly torch's conversion, for numbers in and between the e4m3 ones; 448 in each head makes the scale 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = torch.tensor(sorted(set(numbers[numbers.isfinite()].tolist())))
    between = (numbers[1:] + numbers[:-1]) / 2
    rows = torch.cat((numbers, between, torch.nextafter(between, numbers[1:])))
    rows = torch.nn.functional.pad(rows, (0, -len(rows) % 15)).view(1, -1, 15)
    rows = torch.nn.functional.pad(rows, (0, 1), value=448.0).to(device)
    ours, twins = (make_caches(rows.shape[1], 16, torch.float32, FP8, FP8, device) for _ in range(2))
    slots = torch.tensor([40], device=device)
    write(rows, rows, *ours, slots)
    write_twin(rows, rows, *twins, slots)
    assert torch.equal(ours[0].float(), twins[0].float())
    assert ours[2] is not None
    assert (ours[2].flatten(0, 1)[40] == 1).all()


def test_keys_and_values_may_be_views(device: torch.device) -> None:
    heads = torch.randn(4, 6, 32, device=device)
    ours, twins = (make_caches(2, 32, torch.float32, torch.float32, torch.float32, device) for _ in range(2))
    slots = torch.tensor([3, 60, 1, 95], device=device)
    write(heads[:, 1:3], heads[:, 4:], *ours, slots)
    write_twin(heads[:, 1:3], heads[:, 4:], *twins, slots)
    for actual, wanted in zip(contents(ours), contents(twins), strict=True):
        assert torch.equal(actual, wanted)
    write(heads[:0, :2], heads[:0, :2], *ours, slots[:0])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    caches = make_caches(2, 32, torch.float32, torch.float32, torch.float32, device)
    rows = torch.randn(1, 3, 32, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(IntegrityError, match="cache does not fit"):
        write(rows, rows, *caches, slots)
    with pytest.raises(IntegrityError, match="heads are not rows"):
        write(rows.mT[:, :2], rows.mT[:, :2], *caches, slots)
    with pytest.raises(IntegrityError, match="float32 with scales"):
        write(rows[:, :2], rows[:, :2], *caches[:2], torch.zeros(6, 16, 2, device=device), None, slots)
