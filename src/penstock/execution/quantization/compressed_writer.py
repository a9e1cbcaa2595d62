"""Reads a folder of safetensors files and writes one in the format of compressed-tensors, which vLLM and transformers read.

Format (https://github.com/vllm-project/compressed-tensors, version 0.12 and later). For every quantised NAME.weight [N, K]:

    int-quantized    NAME.weight         int8 [N, K]
                     NAME.weight_scale   [N, 1]
    float-quantized  NAME.weight         float8_e4m3fn [N, K]
                     NAME.weight_scale   [N, 1]
    pack-quantized   NAME.weight_packed  int32 [N, K / 8]; 8 codes of 4 bits each, the first in the lowest bits; code = value + 8
                     NAME.weight_scale   [N, K / group_size]
                     NAME.weight_shape   int64 [2]: N, K

weight = value * scale. Which modules are quantised, and how, says `quantization_config` in config.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.quantized import Float8Tensor, QuantizedTensor
from penstock.execution.quantization.quantize import Scheme

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Bytes of tensors that are kept until they are written into one file.
_SHARD_BYTES = 2**30

# What a model folder holds besides weights. Not copied: what is made anew, and the list of what was pulled from the hub.
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")
_NOT_COPIED = ("config.json", _INDEX, "penstock.json")


class SafetensorsReader:
    """The tensors of a model folder, memory-mapped. Raises ModelFormatError, naming the file, for what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        files = [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelFormatError(f"{folder} has no safetensors files; only such checkpoints can be quantised.")
        for file in files:
            try:
                self._opened[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFormatError(f"{file} is no safetensors file: {error}.") from error
            self._files.update(dict.fromkeys(self._opened[file].keys(), file))
        self.nbytes = sum(file.stat().st_size for file in files)

    def names(self) -> Sequence[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelFormatError(f"The checkpoint lacks the tensor {name!r}; get it again.")
        tensor: Tensor = self._opened[self._files[name]].get_tensor(name)
        if not tensor.is_floating_point():
            raise ModelFormatError(
                f"{self._files[name]}: tensor {name!r} has type {tensor.dtype}; only floats are quantised."
            )
        return tensor


class CompressedWriter:
    """Writes tensors into `folder`, which exists and is empty, in files of about 1 GiB. Call `finish` at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._pending_bytes = 0
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor that is kept as it is."""
        self._tensors[name] = tensor.contiguous()
        self.nbytes += tensor.nbytes
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= _SHARD_BYTES:
            self._flush()

    def add_quantized(self, name: str, tensor: QuantizedTensor | Float8Tensor, scale_dtype: torch.dtype) -> None:
        """A quantised weight; symmetric, in the order of its input features. 8-bit floats have a scale per output feature."""
        if isinstance(tensor, Float8Tensor):
            self.add(name, tensor.codes)
            self.add(f"{name}_scale", tensor.scales.to(scale_dtype))
            return
        if tensor.offsets is not None or tensor.input_order is not None:
            raise ValueError(f"{name}: only symmetric weights without an input order have this format")
        scales = tensor.scales.to(scale_dtype)
        if tensor.bits == 8:
            self.add(name, (tensor.codes.to(torch.int16) - tensor.zero_code).to(torch.int8))
            self.add(f"{name}_scale", scales)
            return
        self.add(f"{name}_packed", pack_codes(tensor.codes))
        self.add(f"{name}_scale", scales)
        self.add(f"{name}_shape", torch.tensor(tensor.shape))

    def finish(self, source: Path, scheme: Scheme) -> None:
        """Write what is left, config.json, and copies of the other files of the folder `source`."""
        self._flush()
        self._name_files()
        config = json.loads((source / "config.json").read_bytes())
        config["quantization_config"] = quantization_config(scheme)
        (self._folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and file.suffix in _COPIED_SUFFIXES
                and file.name not in _NOT_COPIED
                and file.name[0] != "."
            ):
                shutil.copyfile(file, self._folder / file.name)

    def _flush(self) -> None:
        if not self._tensors:
            return
        file = self._folder / f"part-{len(self._files)}.safetensors"
        save_file(self._tensors, file, metadata={"format": "pt"})
        # The library makes files that only their owner can read; a model is no secret.
        file.chmod(0o644)
        self._files.append((file, list(self._tensors)))
        self._tensors = {}
        self._pending_bytes = 0

    def _name_files(self) -> None:
        """model.safetensors, or numbered files and their index."""
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / _SINGLE)
            return
        weight_map = {}
        for number, (file, names) in enumerate(self._files, start=1):
            name = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            file.rename(self._folder / name)
            weight_map.update(dict.fromkeys(names, name))
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def pack_codes(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [N, K], K a multiple of 8 → int32 [N, K / 8]."""
    pairs = codes.view(codes.shape[0], -1, 2)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).contiguous().view(torch.int32)


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The object in config.json: one group with all linear layers but the output head, which stays as it was."""
    kind = "float" if scheme.floating else "int"
    weights = {
        "num_bits": scheme.bits,
        "type": kind,
        "symmetric": True,
        "group_size": scheme.group_size,
        "strategy": "channel" if scheme.group_size is None else "group",
        "dynamic": False,
    }
    activations = None
    if scheme.activation_bits is not None:
        activations = {
            "num_bits": scheme.activation_bits,
            "type": kind,
            "symmetric": True,
            "group_size": None,
            "strategy": "token",
            "dynamic": True,
        }
    form = f"{kind}-quantized" if scheme.bits == 8 else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": form}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


@contextmanager
def new_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    Raises ConfigError when `target` is there already; with `force`, a model folder (one with a config.json) is replaced.
    """
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        draft.chmod(0o755)
        yield draft
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        if draft.exists():
            shutil.rmtree(draft)


def check_target(target: Path, *, force: bool) -> None:
    """Raise ConfigError unless `target` is free, or a model folder that may be replaced."""
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target} exists already; choose another folder, or give --force to replace it.")
    if not (target / "config.json").is_file():
        raise ConfigError(f"{target} is no model folder, so --force does not replace it; choose another folder.")
