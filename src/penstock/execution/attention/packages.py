"""Packages with attention kernels that may be installed beside ours: what they are called, and which of them are here.

Nothing is imported to find out: importing one loads CUDA libraries and takes seconds.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class AttentionPackage:
    """backend: the name of the attention backend that uses it. module: what is imported. distribution: what is installed."""

    backend: str
    module: str
    distribution: str

    @property
    def installed(self) -> bool:
        """Whether the module can be found; importing it may still fail."""
        try:
            return find_spec(self.module) is not None
        except ValueError:  # a module without a specification, such as a stub that someone put into sys.modules
            return self.module in sys.modules

    @property
    def version(self) -> str:
        """Such as '2.8.3'; '' when it does not say."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return str(getattr(sys.modules.get(self.module), "__version__", ""))

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


FLASHINFER = AttentionPackage("flashinfer", "flashinfer", "flashinfer-python")
FLASH_ATTENTION_2 = AttentionPackage("flash-attention", "flash_attn", "flash-attn")
# Built from the folder `hopper` of the same repository; its module stands at the top level.
FLASH_ATTENTION_3 = AttentionPackage("flash-attention", "flash_attn_interface", "flash_attn_3")

PACKAGES = (FLASH_ATTENTION_3, FLASH_ATTENTION_2, FLASHINFER)


def installed_packages() -> list[AttentionPackage]:
    """Those of PACKAGES that are here."""
    return [package for package in PACKAGES if package.installed]


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version, for comparisons: '2.8.3.post1' → (2, 8); (0, 0) when it has none."""
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return (0, 0)
    return int(parts[0]), int(parts[1])
