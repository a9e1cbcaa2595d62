"""What a GPU can do at most, as numbers: without torch, so that a process that only reads results does not load it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPUCeilings:
    """Per second: bytes read and written by a copy within the card (both count), bytes read by a sum, operations of a product of two square
    matrices (a multiplication and an addition are two; None: no units for it), bytes over the bus to and from pinned memory. Seconds per
    kernel: launched one by one by torch, and in a CUDA graph."""

    copy_bytes: float
    read_bytes: float
    bfloat16: float
    float16: float
    float8: float | None
    to_device_bytes: float
    to_host_bytes: float
    launch_s: float
    graph_launch_s: float | None

    @property
    def bandwidth(self) -> float:
        """Bytes per second of whatever moves them fastest."""
        return max(self.copy_bytes, self.read_bytes)

    def peak(self, arithmetic: str) -> float:
        """Operations per second; for float32 what 16-bit products reach, which no float32 product exceeds."""
        peaks = {"bfloat16": self.bfloat16, "float16": self.float16, "float8": self.float8}
        return peaks.get(arithmetic) or max(self.bfloat16, self.float16)

    def seconds(self, bytes_moved: float, operations: float, arithmetic: str) -> float:
        """The least time for that much work."""
        return max(bytes_moved / self.bandwidth, operations / self.peak(arithmetic))
