"""The bounds of benchmarks/gpu are those that its targets were made from, and its workloads are the published ones."""

from __future__ import annotations

import random

import pytest
from benchmarks.gpu.roofline import (
    FORMATS,
    NOMINAL_LAUNCH,
    Card,
    Sizes,
    decode_rate,
    prefill_seconds,
    step_seconds,
    workload_seconds,
)
from benchmarks.gpu.workloads import nano, shortened

# Shape, weights, GB per step, tokens/s of one request at a context of 0 and of 1,024, of 64 and of 256 requests at 1,024 with 16-bit keys
# and values and with 8-bit ones, all at 4.3 TB/s.
TABLE = [
    ("tinyllama-1.1b", "bf16", 2.069, (2078, 2055), (77.6e3, 98.0e3), (138.0e3, 219.2e3)),
    ("tinyllama-1.1b", "int8", 1.035, (4156, 4066), (109.6e3, 155.2e3), (158.6e3, 276.1e3)),
    ("tinyllama-1.1b", "int8, head bf16", 1.100, (3909, 3828), (106.8e3, 149.7e3), (157.1e3, 271.6e3)),
    ("tinyllama-1.1b", "int4 g128, head bf16", 0.631, (6816, 6576), (130.6e3, 201.0e3), (168.4e3, 307.2e3)),
    ("tinyllama-1.1b", "int4 g32 with zeros, head bf16", 0.737, (5836, 5659), (124.3e3, 186.6e3), (165.7e3, 298.4e3)),
    ("qwen3-0.6b", "bf16", 1.192, (3607, 3284), (31.6e3, 55.6e3), (35.2e3, 67.8e3)),
    ("qwen2.5-1.5b", "bf16", 3.087, (1393, 1380), (55.4e3, 68.3e3), (103.8e3, 160.8e3)),
    ("llama-3.2-1b", "bf16", 2.472, (1740, 1716), (59.6e3, 77.6e3), (99.5e3, 162.7e3)),
    ("llama-3.1-8b", "bf16", 15.010, (286, 284), (11.7e3, 14.3e3), (22.3e3, 34.2e3)),
    ("llama-3.1-8b", "fp8", 7.505, (573, 563), (17.1e3, 23.3e3), (26.3e3, 44.6e3)),
    ("llama-3.1-8b", "int4 g128, head bf16", 4.650, (925, 899), (20.8e3, 30.8e3), (28.2e3, 50.4e3)),
]


@pytest.mark.parametrize(("shape", "weights", "gigabytes", "one", "b64", "b256"), TABLE)
def test_bounds_are_those_that_targets_were_made_from(
    shape: str,
    weights: str,
    gigabytes: float,
    one: tuple[float, float],
    b64: tuple[float, float],
    b256: tuple[float, float],
) -> None:
    sizes, bytes_alone = Sizes.read(shape), Card(peak=1e30)
    format_ = FORMATS[weights]
    assert sizes.weight_bytes(format_) / 1e9 == pytest.approx(gigabytes, abs=0.0006)
    for context, expected in zip((0, 1024), one, strict=True):
        assert decode_rate(sizes, format_, 1, context, bytes_alone) == pytest.approx(expected, rel=0.002)
    for requests, rates in ((64, b64), (256, b256)):
        for kv_bytes, expected in zip((2.0, 1.0), rates, strict=True):
            rate = decode_rate(sizes, format_, requests, 1024, bytes_alone, kv_bytes=kv_bytes)
            assert rate == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("shape", "weights", "bound"),
    [
        ("tinyllama-1.1b", "bf16", 1457),
        ("tinyllama-1.1b", "int8", 2242),
        ("tinyllama-1.1b", "int4 g128, head bf16", 2840),
        ("qwen2.5-1.5b", "bf16", 1023),
        ("llama-3.1-8b", "bf16", 264),
        ("llama-3.1-8b", "fp8", 490),
        ("llama-3.1-8b", "int4 g128, head bf16", 726),
    ],
)
def test_launches_limit_small_models_more_than_bytes_do(shape: str, weights: str, bound: float) -> None:
    rate = decode_rate(Sizes.read(shape), FORMATS[weights], 1, 0, Card(launch=NOMINAL_LAUNCH))
    assert rate == pytest.approx(bound, rel=0.002)


def test_arithmetic_limits_large_batches_of_small_weights() -> None:
    sizes, int4 = Sizes.read("llama-3.1-8b"), FORMATS["int4 g128, head bf16"]
    assert step_seconds(sizes, int4, 256, 1024, Card()) >= 2 * (sizes.linear + sizes.head) * 256 / 790e12
    slow = Card(peak=1e12)
    assert step_seconds(sizes, int4, 256, 1024, slow) > 10 * step_seconds(sizes, int4, 256, 1024, Card())


@pytest.mark.parametrize(("shape", "milliseconds"), [("tinyllama-1.1b", 2.6), ("llama-3.1-8b", 18.45)])
def test_prefill_bound(shape: str, milliseconds: float) -> None:
    assert prefill_seconds(Sizes.read(shape), 1024, Card()) * 1e3 == pytest.approx(milliseconds, rel=0.015)


def test_the_nano_workload_is_the_published_one() -> None:
    workload = nano()
    assert (workload.prompt_tokens, workload.output_tokens) == (142_827, 133_966)
    # The statements of bench.py.
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    assert workload.prompts == prompts
    assert workload.outputs == [random.randint(100, 1024) for _ in range(256)]


@pytest.mark.parametrize(
    ("shape", "rate"),
    [
        ("qwen3-0.6b", 36.5e3),
        ("tinyllama-1.1b", 90.7e3),
        ("qwen2.5-1.5b", 66.4e3),
        ("llama-3.2-1b", 71.9e3),
        ("llama-3.1-8b", 13.7e3),
    ],
)
def test_the_bound_of_the_nano_workload(shape: str, rate: float) -> None:
    workload = nano()
    lengths = [len(prompt) for prompt in workload.prompts]
    seconds = workload_seconds(Sizes.read(shape), FORMATS["bf16"], lengths, workload.outputs, Card())
    assert workload.output_tokens / seconds == pytest.approx(rate, rel=0.003)


def test_rounds_of_a_workload_share_no_prefix_and_keep_their_lengths() -> None:
    first, second = nano(8).requests(0), nano(8).requests(1)
    assert [request.prompt for request in first] == nano(8).prompts
    assert [request.prompt_tokens for request in first] == [request.prompt_tokens for request in second]
    assert all(left.prompt[0] != right.prompt[0] for left, right in zip(first, second, strict=True))
    assert max(max(request.prompt) for request in second if isinstance(request.prompt, list)) <= 10_000


def test_a_shortened_workload_is_its_beginning() -> None:
    short = shortened(nano(), 4, 200)
    assert [prompt[:100] for prompt in short.prompts] == [prompt[:100] for prompt in nano().prompts[:4]]
    assert max(map(len, short.prompts)) <= 200
    assert max(short.outputs) <= 200
