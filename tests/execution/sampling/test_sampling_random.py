import pytest
import torch
from torch import Tensor

from penstock.execution.sampling.random import Stream, position_starts, stream_keys, uniforms
from tests.execution.sampling.reference_sampler import MASK, reference_start, reference_uniform, splitmix64

# Numbers of chunks, and of tokens.
NUMBERS = (0, 1, 1186, 2**32, 2**32 + 151_935)
GOLDEN = [
    [0.13870941014555427, 0.3313646487942522],
    [0.8865179945596998, 0.9627370330949495],
    [0.9332145988340744, 0.5967189581660076],
    [0.5734500799956276, 0.7514101170721293],
]


def _start(seed: int, sample_index: int, position: int, stream: Stream = Stream.SAMPLE) -> Tensor:
    return position_starts(
        stream_keys(torch.tensor([seed]), torch.tensor([sample_index])), torch.tensor([position]), stream
    )


def _first_uniforms(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    return uniforms(position_starts(stream_keys(seeds, sample_indices), positions), torch.zeros_like(seeds))


def test_matches_integer_arithmetic_bit_by_bit() -> None:
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123_456_789_012):
        for sample_index in (0, 1, 127):
            for position in (0, 1, 77):
                for stream in Stream:
                    start = _start(seed, sample_index, position, stream)
                    expected = reference_start(seed, sample_index, position, stream)
                    assert int(start) & MASK == expected
                    numbers = uniforms(start, torch.tensor(NUMBERS)).tolist()
                    assert numbers == [reference_uniform(expected, number) for number in NUMBERS]


def test_numbers_of_a_position_are_outputs_of_the_generator() -> None:
    for number in (0, 1, 2, 130):
        assert reference_uniform(77, number) == ((splitmix64(77, number) >> 12) + 0.5) / 2.0**52


def test_golden_values() -> None:
    """A generation continues on an equal engine of another version only while these stay."""
    starts = [_start(0, 0, 0), _start(42, 0, 100), _start(42, 1, 100), _start(-7, 3, 131_071)]
    numbers = torch.tensor([0, 2**32 + 5])
    assert [uniforms(start, numbers).tolist() for start in starts] == GOLDEN


def test_uniform_and_inside_the_open_interval() -> None:
    keys = stream_keys(torch.arange(100), torch.zeros(100, dtype=torch.int64))
    starts = position_starts(keys.repeat_interleave(10), torch.arange(10).repeat(100))
    numbers = uniforms(starts.unsqueeze(1), torch.arange(100) + 2**32)
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers.float().flatten(), bins=100, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 148.2  # 99 degrees of freedom, p = 0.001


def test_neighbouring_seeds_indices_and_positions_are_independent() -> None:
    n = 20_000
    base = torch.arange(n)
    zero = torch.zeros(n, dtype=torch.int64)
    start = _start(0, 0, 0)
    series = [
        _first_uniforms(base, zero, zero),
        _first_uniforms(base + 1, zero, zero),
        _first_uniforms(base, zero + 1, zero),
        _first_uniforms(base, zero, zero + 1),
        _first_uniforms(zero, base, zero),
        _first_uniforms(zero, zero, base),
        uniforms(start, base + 1),
        uniforms(start, base + 2**32),
        uniforms(position_starts(stream_keys(base, zero), zero), zero + 1),
    ]
    correlations = torch.corrcoef(torch.stack(series)) - torch.eye(len(series), dtype=torch.float64)
    assert float(correlations.abs().max()) < 4.5 / n**0.5


def test_a_row_does_not_depend_on_its_batch() -> None:
    seeds, indices, positions = torch.randint(-(2**62), 2**62, (64,)), torch.arange(64) % 5, torch.arange(64) * 31
    numbers = _first_uniforms(seeds, indices, positions)
    rows = zip(seeds.tolist(), indices.tolist(), positions.tolist(), strict=True)
    assert numbers.tolist() == [float(uniforms(_start(*row), torch.tensor(0))) for row in rows]


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits() -> None:
    seeds, indices, positions = torch.randint(-(2**62), 2**62, (1000,)), torch.arange(1000) % 5, torch.arange(1000)
    here = _first_uniforms(seeds, indices, positions)
    there = _first_uniforms(seeds.cuda(), indices.cuda(), positions.cuda())
    assert torch.equal(here, there.cpu())
