"""Packed weights on disk, so that the next start maps them instead of quantising and packing again.

    $PENSTOCK_CACHE_DIR/weights, else $XDG_CACHE_HOME/penstock/weights, else ~/.cache/penstock/weights /
        KEY.safetensors    all packed weights of one model with one set of settings

KEY is made from what the weights are made from: sizes, heads and samples of the checkpoint's files, config.json, the settings and the
version of the layout. A file is a safetensors file whose tensors start at multiples of 64 bytes; its metadata holds the key, how tensors
make up weights, and a checksum of the header. Whatever is wrong with a file, it is then not used, and a line in the log says why.

Files appear under their names only when they are complete. Those used longest ago are deleted when all together exceed 20 GiB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.quantization.weight_file import LAYOUT_VERSION, WeightFileError, map_weights, write_weights

logger = logging.getLogger(__name__)

MAX_BYTES = 20 * 2**30
# Loads that made less than this anew are as fast without a cache.
MIN_BYTES = 64 * 2**20

_HEAD_BYTES = 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
# A temporary file this old belongs to a process that is gone.
_STALE_S = 24 * 3600.0
_LOWEST_PRIORITY = 19
# Left free on the disk, whatever happens.
_SPARE_BYTES = 2**30


def default_folder() -> Path:
    """Where packed weights are kept; see the top of this file."""
    if chosen := os.environ.get("PENSTOCK_CACHE_DIR"):
        return Path(chosen) / "weights"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "penstock" / "weights"


def content_key(config_file: Path, files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """The name of what comes of these files with these settings. Reads the first MiB and 64 pages of each weight file."""
    digest = hashlib.sha256(config_file.read_bytes())
    digest.update(json.dumps([LAYOUT_VERSION, dict(settings)], sort_keys=True).encode())
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_HEAD_BYTES))
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class WeightCache:
    """One place in the cache. key: see `content_key`."""

    folder: Path
    key: str

    @property
    def file(self) -> Path:
        """Where the weights are, if they are."""
        return self.folder / f"{self.key}.safetensors"

    def read(self, bf16_arithmetic: bool) -> dict[str, NativeLinear]:
        """Module name → weight, mapped from the file and not read yet; empty when there is none that can be used."""
        try:
            weights = map_weights(self.file, self.key)
            os.utime(self.file)
        except FileNotFoundError:
            return {}
        except (WeightFileError, OSError) as error:
            logger.warning("cached weights are not used: %s", error)
            return {}
        return {name: NativeLinear(segments, bf16_arithmetic=bf16_arithmetic) for name, segments in weights.items()}

    def pending(self, weights: Mapping[str, NativeLinear]) -> PendingCache | None:
        """What `write` would write; None when it is not worth it."""
        size = sum(weight.nbytes for weight in weights.values())
        return PendingCache(self, weights, size) if size >= MIN_BYTES else None


@dataclass(frozen=True)
class PendingCache:
    """Packed weights that are not on disk yet. nbytes: about what the file will take."""

    cache: WeightCache
    weights: Mapping[str, NativeLinear]
    nbytes: int

    def write_in_background(self) -> threading.Thread:
        """Write the file in a thread of the lowest priority, which the process does not wait for when it ends. Call it after the start."""

        def write() -> None:
            if hasattr(os, "setpriority"):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
            self.write()

        thread = threading.Thread(target=write, name="penstock-weight-cache", daemon=True)
        thread.start()
        return thread

    def write(self) -> bool:
        """Write the file. Nothing that goes wrong is raised: the log says it. Returns success."""
        folder = self.cache.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            make_room(folder, self.nbytes)
            free = shutil.disk_usage(folder).free
            if free < self.nbytes + _SPARE_BYTES:
                logger.info("packed weights are not cached: %s has %.1f GiB left", folder, free / 2**30)
                return False
            self._write_to(folder)
        except OSError as error:
            logger.warning("packed weights could not be cached in %s: %s", folder, error)
            return False
        return True

    def _write_to(self, folder: Path) -> None:
        descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=folder)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                segments = {module: weight.segments for module, weight in self.weights.items()}
                write_weights(stream, self.cache.key, segments)
            temporary.replace(self.cache.file)
        finally:
            temporary.unlink(missing_ok=True)


def make_room(folder: Path, nbytes: int) -> None:
    """Delete files of `folder`, those used longest ago first, until `nbytes` more fit under the limit; and what dead processes left."""
    for leftover in folder.glob(".writing-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_S:
            leftover.unlink(missing_ok=True)
    files = sorted(((file.stat(), file) for file in folder.glob("*.safetensors")), key=lambda pair: pair[0].st_mtime)
    total = sum(status.st_size for status, _ in files)
    for status, file in files:
        if total + nbytes <= MAX_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size
