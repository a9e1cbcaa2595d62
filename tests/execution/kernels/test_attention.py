"""The twins that the native attention is compared with are themselves right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.execution.kernels.attention import attention_twin, read_cached
from penstock.execution.kernels.rows import kv_write_twin


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_the_twin_is_what_torch_computes(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(9, 6, 16, generator=generator)
    key, value = torch.randn(2, 30, kv_heads, 16, generator=generator)
    positions = torch.arange(21, 30).unsqueeze(1)
    for window in (None, 4):
        seen = torch.arange(30) <= positions
        if window is not None:
            seen &= torch.arange(30) > positions - window
        expected = F.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), seen, scale=0.2, enable_gqa=True
        )
        actual = attention_twin(query, key, value, 0.2, window, torch.float32)
        torch.testing.assert_close(actual, expected.transpose(0, 1))


@pytest.mark.parametrize("keys", [True, False])
def test_tiles_give_back_what_was_written(keys: bool) -> None:
    rows = torch.randn(40, 2, 6, generator=torch.Generator().manual_seed(0))
    blocks = torch.tensor([2, 0])
    slots = torch.cat((torch.arange(64, 96), torch.arange(8)))
    tiles = torch.zeros((3, 2, 2, 6, 16) if keys else (3, 2, 2, 16, 6))
    kv_write_twin(tiles, None, rows, slots, keys=keys)
    assert torch.equal(read_cached(tiles, None, blocks, keys=keys)[:40], rows)
    codes, scales = tiles.to(torch.int8), torch.zeros(3, 2, 32)
    kv_write_twin(codes, scales, rows, slots, keys=keys)
    error = (read_cached(codes, scales, blocks, keys=keys)[:40] - rows).abs()
    assert (error <= rows.abs().amax(-1, keepdim=True) * 0.501 / 127).all()
    assert error.any()
