"""The ceilings of a GPU: bytes per second over its memory and over the bus, products per second, the time between two launches.

Each figure is the median of several attempts except rates, of which the best counts: a ceiling is what the card can do. Matrices hold
random numbers, because zeros take less power and multiply faster than any model's. A trial on a CPU runs the same code on small tensors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.execution.measurement.gpu_card import GPUCeilings
from penstock.execution.measurement.gpu_timing import time_in_turns

ATTEMPTS = 7
COPY_BYTES = 4 * 2**30
PINNED_BYTES = 2**28
MATRIX = 8192
LAUNCHES = 1000


def measure_gpu_ceilings(device: torch.device) -> GPUCeilings:
    """Takes about three seconds and 8 GiB on a GPU."""
    small = device.type != "cuda"
    with torch.inference_mode():
        copy, read = _memory(2**20 if small else COPY_BYTES, device)
        size = 64 if small else MATRIX
        to_device, to_host = _bus(2**20 if small else PINNED_BYTES, device)
        launch, graph_launch = _launches(10 if small else LAUNCHES, device)
        return GPUCeilings(
            copy_bytes=copy,
            read_bytes=read,
            bfloat16=_product(size, torch.bfloat16, device),
            float16=_product(size, torch.float16, device),
            float8=_float8_product(size, device),
            to_device_bytes=to_device,
            to_host_bytes=to_host,
            launch_s=launch,
            graph_launch_s=graph_launch,
        )


def _memory(nbytes: int, device: torch.device) -> tuple[float, float]:
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    runs = {"copy": lambda _: target.copy_(source), "read": lambda _: source.sum()}
    seconds = time_in_turns(runs, 1, device, rounds=ATTEMPTS).seconds
    return 2 * nbytes / min(seconds["copy"]), nbytes / min(seconds["read"])


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    output = torch.empty(size, size, device=device, dtype=dtype)
    return _operations(size, lambda _: torch.mm(left, right, out=output), device)


def _float8_product(size: int, device: torch.device) -> float | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    left, right = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply(_: int) -> Tensor:
        return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _operations(size, multiply, device)


def _operations(size: int, multiply: Callable[[int], Tensor], device: torch.device) -> float:
    seconds = time_in_turns({"": multiply}, 1, device, rounds=ATTEMPTS).seconds[""]
    return 2 * size**3 / min(seconds)


def _bus(nbytes: int, device: torch.device) -> tuple[float, float]:
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    to_device = _wall(lambda: there.copy_(host, non_blocking=True), device)
    to_host = _wall(lambda: host.copy_(there, non_blocking=True), device)
    return nbytes / to_device, nbytes / to_host


def _launches(count: int, device: torch.device) -> tuple[float, float | None]:
    number = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            number.add_(1)

    launch = _wall(many, device) / count
    if device.type != "cuda":
        return launch, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return launch, _wall(graph.replay, device) / count


def _wall(function: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done, the median of several attempts."""
    seconds = []
    for _ in range(ATTEMPTS + 1):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
