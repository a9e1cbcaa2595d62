"""What the runner needs of a device whose work goes on behind the host's back: pinned memory, marks in its queue, recorded work.

    host     prepare N+1 ───────┐ launch          take results of N …
    device   │ step N …                │ step N+1 …            in order, one queue

`CudaAccelerator` is a GPU. `HostAccelerator` stands for one on the CPU, where Triton's interpreter runs the kernels: the same runner,
with work done when it is asked for. Its copies to the host arrive when they are waited for and no sooner, what was sent from the host is
compared then with what is there, and recorded work is the recorded function called again: a runner that reads a result early, writes to
memory that is still being copied, or bakes a number into a graph is found out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.core.errors import IntegrityError


class Mark(Protocol):
    """A place in the device's queue."""

    def reached(self) -> bool:
        """Whether everything before it is done."""
        ...

    def wait(self) -> None:
        """Block until it is. Raises what the device reported meanwhile."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Time on the device between two marks that are both reached."""
        ...


class Accelerator(Protocol):
    """One device and its queue of work, used from one thread."""

    @property
    def device(self) -> torch.device: ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed host memory that the device copies from and to without the host waiting."""
        ...

    def mark(self) -> Mark:
        """A mark behind all work given so far."""
        ...

    def send(self, source: Tensor, target: Tensor) -> None:
        """Queue the copy of pinned memory into a device tensor of the same shape. The source must stay as it is until a later mark is
        reached."""
        ...

    def fetch(self, source: Tensor, target: Tensor) -> None:
        """Queue the copy of a device tensor into pinned memory of the same shape. It is there when a later mark is reached."""
        ...

    def is_lost(self) -> bool:
        """Whether an error has made the device useless to this process: after a fault in a kernel every further call fails. Waits for all
        work given so far; to be asked when something was raised."""
        ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record the work that `function` gives the device, without running it; the result replays it. The work finds its inputs where
        they were when it was recorded, whatever is in them then. Raises torch.OutOfMemoryError."""
        ...

    def free_bytes(self) -> int:
        """Memory that can be allocated now, with what the allocator keeps for itself given back first."""
        ...

    def peak_bytes(self, function: Callable[[], None]) -> int:
        """The most memory that is allocated beyond what was before, while `function` runs."""
        ...


class CudaMark:
    """See Mark."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def reached(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)  # noqa: S101  one device has one kind of marks
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaAccelerator:
    """See Accelerator. All recorded work shares one pool of memory, so that graphs cost what the largest of them costs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> CudaMark:
        return CudaMark()

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def fetch(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        self._pool = self._pool or graph.pool()
        return graph.replay

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak_bytes(self, function: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device)) - before


class HostMark:
    """See Mark. What was fetched before it arrives when it is waited for."""

    def __init__(self, deliver: Callable[[], None]) -> None:
        self._deliver: Callable[[], None] | None = deliver
        self._time = time.perf_counter()

    def reached(self) -> bool:
        return self._deliver is None

    def wait(self) -> None:
        if self._deliver is not None:
            self._deliver()
            self._deliver = None

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)  # noqa: S101  one device has one kind of marks
        return self._time - earlier._time


class HostAccelerator:
    """See Accelerator and the module's description."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._arriving: list[Callable[[], None]] = []
        self._last_mark: HostMark | None = None

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def mark(self) -> HostMark:
        arriving, self._arriving = self._arriving, []
        earlier = self._last_mark

        def deliver() -> None:
            if earlier is not None:
                earlier.wait()
            for arrive in arriving:
                arrive()

        self._last_mark = HostMark(deliver)
        return self._last_mark

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)
        sent = source.clone()

        def compare() -> None:
            if not torch.equal(source, sent):
                raise IntegrityError("pinned memory was written to before the device had copied it")

        self._arriving.append(compare)

    def fetch(self, source: Tensor, target: Tensor) -> None:
        fetched = source.clone()

        def arrive() -> None:
            with torch.inference_mode():
                target.copy_(fetched)

        self._arriving.append(arrive)

    def is_lost(self) -> bool:
        self.mark().wait()
        return False

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function

    def free_bytes(self) -> int:
        from penstock.execution.runner.kv_memory import free_host_memory

        return free_host_memory()

    def peak_bytes(self, function: Callable[[], None]) -> int:
        """An unknown number, given as 0: the host's allocator does not count."""
        function()
        return 0
