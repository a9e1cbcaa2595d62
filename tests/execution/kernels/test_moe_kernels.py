"""The native kernel of a mixture of experts against its twin, its exactness, and which memory it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels import native
from penstock.execution.kernels.linear import NativeLinear, pack_float, pack_quantized
from penstock.execution.kernels.moe import ExpertKernels, NativeExperts, Routing, experts_twin, route
from penstock.execution.quantization.rounding import RoundingScheme

HIDDEN, INNER = 96, 64
KINDS = ("float32", "bfloat16", "float16", "int8", "int4")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(kind: str, rows: int, columns: int, seed: int) -> NativeLinear:
    weight = numbers(rows, columns, seed=seed) * columns**-0.5
    if kind.startswith("int"):
        rounded = RoundingScheme(int(kind[3:]), 32).begin(rows, columns)
        rounded.put(0, weight)
        return NativeLinear([pack_quantized(rounded.tensor(), None)])
    return NativeLinear([pack_float(weight.to(getattr(torch, kind)), None)])


def experts(kind: str, count: int) -> list[tuple[NativeLinear, NativeLinear]]:
    return [
        (linear(kind, 2 * INNER, HIDDEN, 2 * number), linear(kind, HIDDEN, INNER, 2 * number + 1))
        for number in range(count)
    ]


def twin(
    x: Tensor, logits: Tensor, routing: Routing, first: int, parts: Sequence[tuple[NativeLinear, NativeLinear]]
) -> Tensor:
    kernels = {first + index: ExpertKernels(gate_up, down) for index, (gate_up, down) in enumerate(parts)}
    return experts_twin(x, *route(logits, routing), kernels)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin(kind: str, isa: str) -> None:
    """The twin multiplies with the same native products, so that only routing, activation and sum differ."""
    parts = experts(kind, 6)
    for tokens, per_token, renormalize, first in (
        (1, 2, True, 0),
        (5, 3, False, 0),
        (70, 2, True, 2),
        (3, 6, False, 0),
    ):
        routing = Routing(6 + 2 * first, per_token, renormalize)
        x, logits = numbers(tokens, HIDDEN, seed=1), numbers(tokens, routing.num_experts, seed=tokens)
        actual = NativeExperts(routing, first, parts, HIDDEN, INNER)(x, logits)
        # Activations of quantised products are rounded, so that a last bit before may be more behind.
        tolerance = 1e-5 if not kind.startswith("int") else 2e-3
        torch.testing.assert_close(actual, twin(x, logits, routing, first, parts), rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_token_has_the_same_bits_in_all_company(kind: str, isa: str, threads: None) -> None:
    routing, parts = Routing(8, 2, True), experts(kind, 8)
    kernel = NativeExperts(routing, 0, parts, HIDDEN, INNER)
    x, logits = numbers(90, HIDDEN, seed=1), numbers(90, 8, seed=2)
    native.set_threads(1)
    alone = torch.cat([kernel(x[i : i + 1], logits[i : i + 1]) for i in range(30)])
    for count in (1, 2):
        native.set_threads(count)
        for size in (3, 90):
            together = torch.cat([kernel(x[i : i + size], logits[i : i + size]) for i in range(0, 30, size)])[:30]
            assert torch.equal(together, alone), (count, size)


@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
def test_equal_shares_go_to_the_first_experts() -> None:
    routing, parts = Routing(4, 2, True), experts("float32", 4)
    x, logits = numbers(3, HIDDEN), torch.tensor([[1.0, 2.0, 2.0, 2.0]]).expand(3, 4)
    between = NativeExperts(routing, 0, parts, HIDDEN, INNER)(x, logits)
    first = NativeExperts(routing, 0, parts, HIDDEN, INNER)(x, torch.tensor([[-9.0, 2.0, 2.0, -9.0]]).expand(3, 4))
    torch.testing.assert_close(between, first, rtol=0, atol=1e-6)


@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
def test_numbers_that_are_none_stay_with_their_token() -> None:
    kernel = NativeExperts(Routing(4, 2, True), 0, experts("int8", 4), HIDDEN, INNER)
    x, logits = numbers(3, HIDDEN), numbers(3, 4)
    expected = kernel(x, logits)
    logits[1], x[1, 0] = torch.nan, torch.nan
    actual = kernel(x, logits)
    assert bool(torch.isnan(actual[1]).all())
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    infinite = torch.full((1, 4), torch.inf)
    assert kernel(x[:1], infinite).shape == (1, HIDDEN)


@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
def test_wrong_shapes_are_refused() -> None:
    parts = experts("float32", 2)
    kernel = NativeExperts(Routing(2, 1, True), 0, parts, HIDDEN, INNER)
    assert kernel(torch.empty(0, HIDDEN), torch.empty(0, 2)).shape == (0, HIDDEN)
    nobody = NativeExperts(Routing(2, 1, True), 2, [], HIDDEN, INNER)
    assert torch.equal(nobody(torch.ones(3, HIDDEN), torch.zeros(3, 2)), torch.zeros(3, HIDDEN))
    with pytest.raises(IntegrityError, match=r"expected float32 \[T, 96\]"):
        kernel(torch.zeros(1, HIDDEN + 1), torch.zeros(1, 2))
    with pytest.raises(IntegrityError, match=r"\[T, 2\] logits"):
        kernel(torch.zeros(1, HIDDEN), torch.zeros(1, 3))
    with pytest.raises(IntegrityError, match="not of the sizes 96 and 64"):
        NativeExperts(
            Routing(2, 1, True), 0, [parts[0], (parts[1][0], linear("float32", HIDDEN, INNER + 16, 0))], HIDDEN, INNER
        )


# Every expert's weights are in memory of their own, which can be taken away. Prints how many bytes belong to experts in use and in all.
READ_ONLY_WHAT_IS_USED = """
import ctypes, mmap, dataclasses
import torch
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.moe import NativeExperts, Routing
from tests.execution.kernels.test_moe_kernels import experts, numbers, HIDDEN, INNER

protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def moved(tensor):
    if tensor is None:
        return None
    memory = mmap.mmap(-1, -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view_as(tensor)
    copy.copy_(tensor)
    places[-1].append((copy.data_ptr(), len(memory), tensor.nbytes))
    kept.append(memory)
    return copy

def move(layer):
    return NativeLinear([dataclasses.replace(s, data=moved(s.data), scales=moved(s.scales)) for s in layer.segments])

places, parts = [], []
for gate_up, down in experts("int8", 8):
    places.append([])
    parts.append((move(gate_up), move(down)))
kernel = NativeExperts(Routing(8, 2, True), 0, parts, HIDDEN, INNER)
x, logits = numbers(1, HIDDEN), numbers(1, 8)
expected = kernel(x, logits)
used = set(logits[0].topk(2).indices.tolist())
for number, pieces in enumerate(places):
    for address, size, _ in pieces:
        assert protect(address, size, 1 if number in used else 0) == 0
assert torch.equal(kernel(x, logits), expected)
read, total = (sum(n for i in which for _, _, n in places[i]) for which in (used, range(8)))
print(read, total, flush=True)
kernel(x, torch.roll(logits, 1))
print("read what was taken away", flush=True)
"""


@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
@pytest.mark.skipif(sys.platform != "linux", reason="takes memory away as Linux does")
def test_a_decode_reads_only_the_experts_that_it_uses() -> None:
    """Memory of all other experts cannot be read during the step; that this is noticed is seen when they are used."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY_WHAT_IS_USED],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    read, total = (int(number) for number in done.stdout.splitlines()[0].split())
    assert read * 4 == total, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode < 0
