"""The attention packages that are installed, on a GPU: their results, and the choice among them."""

from __future__ import annotations

import logging

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCacheSpec, get_attention_backend
from penstock.execution.attention.choice import DECODE, PREFILL
from penstock.execution.attention.stopwatch import DeviceStopwatch
from tests.execution.attention.paged_steps import HEAD_DIM, make_paged_step, written_out

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 24])
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [([37, 1, 300], [1, 1, 1]), ([20, 41, 270], [20, 7, 3]), ([5, 260, 30, 33], [1, 1, 30, 4])],
)
@pytest.mark.parametrize(
    ("name", "block_size"), [("flash-attention", 256), ("flash-attention", 16), ("flashinfer", 16)]
)
def test_attend_equals_attention_written_out(
    name: str,
    block_size: int,
    seq_lens: list[int],
    query_lens: list[int],
    sliding_window: int | None,
    dtype: torch.dtype,
) -> None:
    try:
        backend = get_attention_backend(name, CUDA)
    except ConfigError as error:
        pytest.skip(str(error))
    reason = backend.unsupported(KVCacheSpec(block_size, 2, HEAD_DIM, dtype, dtype), dtype)
    if reason is not None:
        pytest.skip(reason)
    step = make_paged_step(seq_lens, query_lens, num_heads=8, block_size=block_size, dtype=dtype)
    there = step.to(CUDA)
    actual = backend.attend(there.query, there.cache, there.metadata, 0.1, sliding_window)
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    expected = written_out(step, 0.1, sliding_window)
    torch.testing.assert_close(actual.double().cpu(), expected, atol=tolerance, rtol=tolerance)


def test_the_stopwatch_measures_ours() -> None:
    spec = KVCacheSpec(16, 8, 128, torch.bfloat16, torch.bfloat16)
    ours = get_attention_backend("triton", CUDA)
    stopwatch = DeviceStopwatch(ours, CUDA, spec, torch.bfloat16, 32)
    for step in (DECODE, PREFILL):
        stopwatch.warm_up(ours, step)
        assert 1e-6 < stopwatch.seconds(ours, step) < 0.1


def test_auto_says_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    spec = KVCacheSpec(256, 8, 128, torch.bfloat16, torch.bfloat16)
    with caplog.at_level(logging.INFO, "penstock"):
        backend = get_attention_backend("auto", CUDA, spec=spec, arithmetic=torch.bfloat16, num_heads=32, graphs=False)
    assert any(message.startswith(f"attention: {backend.name}") for message in caplog.messages)
