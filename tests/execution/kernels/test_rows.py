"""RMSNorm, SiLU, rotation and cache writes against their twins, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.execution.kernels import native, rows
from penstock.execution.kernels.attention import KV_KINDS, KVCacheStruct
from penstock.execution.kernels.native import pointer

pytestmark = pytest.mark.skipif(not native.native_available(), reason="no native kernels")


@pytest.fixture(autouse=True)
def every_instruction_set(isa: str) -> str:
    return isa


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 15, 16, 70, 192, 2048])
@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_rms_norm(features: int, count: int) -> None:
    x, weight = random(count, features), random(features, seed=1)
    actual = rows.rms_norm(x, weight, 1e-5)
    expected = rows.rms_norm_twin(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=2e-6)
    assert torch.equal(rows.rms_norm(x[-1:], weight, 1e-5)[0], actual[-1])


def test_rms_norm_of_views_and_more_dimensions() -> None:
    x, weight = random(6, 4, 40), random(20, seed=1)
    view = x[:, :, 10:30]
    assert torch.equal(rows.rms_norm(view, weight, 1e-5), rows.rms_norm(view.contiguous(), weight, 1e-5))
    assert rows.rms_norm(x[:0, 0, :20], weight, 1e-5).shape == (0, 20)
    assert rows.rms_norm(torch.full((1, 20), torch.nan), weight, 1e-5).isnan().all()


@pytest.mark.parametrize("features", [1, 16, 30, 512])
@pytest.mark.parametrize("count", [1, 9, 40])
def test_silu_and_mul(features: int, count: int) -> None:
    gate_up = random(count, 2 * features) * 8
    actual = rows.silu_and_mul(gate_up)
    expected = rows.silu_and_mul_twin(gate_up.double())
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=2e-6)
    assert torch.equal(rows.silu_and_mul(gate_up[-1:])[0], actual[-1])


def test_silu_far_out() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, torch.nan] + [1.0] * 6])
    actual = rows.silu_and_mul(gate_up)[0]
    torch.testing.assert_close(actual[:5], torch.tensor([0.0, 0.0, 0.0, 90.0, 1e4]), atol=1e-30, rtol=1e-6)
    assert actual[5].isnan()


@pytest.mark.parametrize("kv_dtype", list(KV_KINDS))
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(4, 2, 16, 16), (3, 1, 20, 32), (2, 2, 80, 16)])
@pytest.mark.parametrize("norms", [False, True])
def test_rotate_and_write(
    heads: int, kv_heads: int, dim: int, block_size: int, norms: bool, kv_dtype: torch.dtype
) -> None:
    tokens, blocks = 11, 4
    qkv = random(tokens, heads + 2 * kv_heads, dim)
    angles = random(50, dim // 2, seed=1)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).contiguous()
    positions = torch.arange(3, 3 + 4 * tokens, 4)
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(2))[:tokens]
    q_norm, k_norm = (random(dim, seed=3), random(dim, seed=4)) if norms else (None, None)

    expected = qkv.clone()
    if q_norm is not None and k_norm is not None:
        expected[:, :heads] = rows.rms_norm_twin(expected[:, :heads], q_norm, 1e-6)
        expected[:, heads : heads + kv_heads] = rows.rms_norm_twin(expected[:, heads : heads + kv_heads], k_norm, 1e-6)
    expected = rows.rotary_twin(expected, heads + kv_heads, cos_sin[positions])

    key = torch.zeros(blocks, kv_heads, block_size // 16, dim, 16, dtype=kv_dtype)
    value = torch.zeros(blocks, kv_heads, block_size // 16, 16, dim, dtype=kv_dtype)
    scales = torch.zeros(2, blocks, kv_heads, block_size) if kv_dtype == torch.int8 else None
    call = rows.RotaryStruct(
        qkv=qkv.data_ptr(),
        qkv_stride=qkv.stride(0),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=block_size,
        positions=positions.data_ptr(),
        cos_sin=cos_sin.data_ptr(),
        q_norm=pointer(q_norm),
        k_norm=pointer(k_norm),
        norm_eps=1e-6,
        slot_mapping=slots.data_ptr(),
        kv_kind=KV_KINDS[kv_dtype],
        cache=KVCacheStruct(
            key.data_ptr(),
            value.data_ptr(),
            None if scales is None else scales[0].data_ptr(),
            None if scales is None else scales[1].data_ptr(),
        ),
    )
    rows.rotary_and_write(call, tokens)
    torch.testing.assert_close(qkv, expected, atol=2e-6, rtol=2e-6)

    # What is written is the kernel's own rounding of what it computed.
    for tiles, index, keys in ((key, heads, True), (value, heads + kv_heads, False)):
        twin = torch.zeros_like(tiles)
        twin_scales = None if scales is None else torch.zeros_like(scales[0])
        rows.kv_write_twin(twin, twin_scales, qkv[:, index : index + kv_heads], slots, keys=keys)
        assert torch.equal(tiles, twin)
        if scales is not None and twin_scales is not None:
            torch.testing.assert_close(scales[0 if keys else 1], twin_scales, atol=0, rtol=1e-6)
