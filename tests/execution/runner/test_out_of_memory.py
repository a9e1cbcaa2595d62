import weakref

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.execution.runner.out_of_memory import is_out_of_memory, let_go_of_tensors, memory_must_suffice


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_running_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_error_that_hides_another_counts_too() -> None:
    """A recording that ran out of memory ends with the error that it was not completed."""

    def record() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        record()
    assert is_out_of_memory(caught.value)


def test_an_error_that_is_kept_keeps_no_tensor() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        in_hand = torch.zeros(10)
        held.append(weakref.ref(in_hand))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    assert held[0]() is not None
    let_go_of_tensors(caught.value)
    assert held[0]() is None


def test_only_memory_is_explained() -> None:
    with pytest.raises(ConfigError, match="lower it"), memory_must_suffice(lambda: "lower it"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="illegal"), memory_must_suffice(lambda: "lower it"):
        raise RuntimeError("an illegal memory access")
