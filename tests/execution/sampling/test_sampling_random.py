import pytest
import torch

from penstock.execution.sampling.random import Stream, stream_keys, uniforms
from tests.execution.sampling.reference_sampler import reference_uniform

GOLDEN = [0.6524484863740322, 0.31064286608234226, 0.4348661829061612, 0.7025630101699437]


def _uniform(seed: int, sample_index: int, position: int, stream: Stream = Stream.SAMPLE) -> float:
    keys = stream_keys(torch.tensor([seed]), torch.tensor([sample_index]))
    return float(uniforms(keys, torch.tensor([position]), stream))


def test_matches_integer_arithmetic_bit_by_bit() -> None:
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123_456_789_012):
        for sample_index in (0, 1, 127):
            for position in (0, 1, 77):
                for stream in Stream:
                    assert _uniform(seed, sample_index, position, stream) == reference_uniform(
                        seed, sample_index, position, stream
                    )


def test_golden_values() -> None:
    """A generation continues on an equal engine of another version only while these stay."""
    assert [_uniform(0, 0, 0), _uniform(42, 0, 100), _uniform(42, 1, 100), _uniform(-7, 3, 131_071)] == GOLDEN


def test_uniform_and_inside_the_open_interval() -> None:
    keys = stream_keys(torch.arange(100), torch.zeros(100, dtype=torch.int64))
    numbers = uniforms(keys.repeat_interleave(1000), torch.arange(1000).repeat(100))
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 148.2  # 99 degrees of freedom, p = 0.001


def test_neighbouring_seeds_indices_positions_and_streams_are_independent() -> None:
    n = 20_000
    base = torch.arange(n)
    zero = torch.zeros(n, dtype=torch.int64)
    series = [
        uniforms(stream_keys(base, zero), zero),
        uniforms(stream_keys(base + 1, zero), zero),
        uniforms(stream_keys(base, zero + 1), zero),
        uniforms(stream_keys(base, zero), zero + 1),
        uniforms(stream_keys(base, zero), zero, Stream.ACCEPT),
        uniforms(stream_keys(zero, base), zero),
        uniforms(stream_keys(zero, zero), base),
    ]
    correlations = torch.corrcoef(torch.stack(series)) - torch.eye(len(series), dtype=torch.float64)
    assert float(correlations.abs().max()) < 4.5 / n**0.5


def test_a_row_does_not_depend_on_its_batch() -> None:
    seeds, indices, positions = torch.randint(-(2**62), 2**62, (64,)), torch.arange(64) % 5, torch.arange(64) * 31
    numbers = uniforms(stream_keys(seeds, indices), positions)
    alone = [_uniform(int(s), int(i), int(p)) for s, i, p in zip(seeds, indices, positions, strict=True)]
    assert numbers.tolist() == alone


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits() -> None:
    seeds, indices, positions = torch.randint(-(2**62), 2**62, (1000,)), torch.arange(1000) % 5, torch.arange(1000)
    here = uniforms(stream_keys(seeds, indices), positions)
    there = uniforms(stream_keys(seeds.cuda(), indices.cuda()), positions.cuda())
    assert torch.equal(here, there.cpu())
