"""What --quantization means for a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.loader import Rounding
from penstock.execution.quantization.fp8 import Float8Rounding
from penstock.execution.quantization.rounding import RoundingScheme

_ROUNDING_SETTINGS = ("int8", "int4", "fp8")
_FORMAT_SETTINGS = ("awq", "gptq", "bitsandbytes")


def check_quantization(config: EngineConfig, model: ModelConfig, folder: Path, *, accelerated: bool) -> None:
    """Raise ConfigError when --quantization asks for what the checkpoint in `folder` is not, or what nothing here computes with.

    accelerated: layers run on a GPU's kernels.
    """
    setting = config.quantization
    method = None if model.quantization is None else model.quantization.method
    if setting == "fp8" and _is_fp8(model):
        return
    if setting == "fp8" and not accelerated:
        raise ConfigError("--quantization fp8 rounds weights to 8-bit floats, which needs a GPU; use int8.")
    if setting in _FORMAT_SETTINGS and method != setting:
        found = "is not quantised" if method is None else f"has the format {method}"
        raise ConfigError(f"--quantization {setting} needs a checkpoint in that format, but {folder} {found}.")
    if setting in _ROUNDING_SETTINGS and method is not None:
        raise ConfigError(
            f"--quantization {setting} rounds plain weights, but {folder} is quantised already ({method}); "
            f"drop --quantization, or give the unquantised model."
        )


def weight_rounding(config: EngineConfig, model: ModelConfig, device: torch.device) -> Rounding | None:
    """How float weights are rounded while they are loaded; `device` is where 8-bit floats are made.

    int8 and int4 take all linear layers and the output head, the head always to 8 bits; fp8 takes the linear layers only. Dummy weights
    in the shape of a quantised checkpoint are rounded about as that is, head excepted: 4 bits of a codebook are integers then, and 8-bit
    floats have a scale per output feature.
    """
    if config.quantization == "fp8" and not _is_fp8(model):
        return Rounding({"linear": Float8Rounding(device)}, "--quantization fp8")
    if config.quantization in ("int8", "int4"):
        layers = RoundingScheme(8 if config.quantization == "int8" else 4, config.quantization_group_size)
        return Rounding({"linear": layers, "head": RoundingScheme(8)}, f"--quantization {config.quantization}")
    if config.load_format == "dummy" and model.quantization is not None and config.quantization != "none":
        if model.quantization.codes == "fp8":
            return Rounding({"linear": Float8Rounding(device)}, "--load-format dummy")
        bits, group_size = model.quantization.bits or 4, model.quantization.group_size or 128
        return Rounding({"linear": RoundingScheme(bits, group_size)}, "--load-format dummy")
    return None


def precision_key(config: EngineConfig, model: ModelConfig, *, gguf: bool) -> str:
    """What --quantization makes of a checkpoint's weights, for a hash: 'stored' when they stay as they are. The same for every part of a
    model, unlike what a process finds that it has loaded. gguf: the weights are in that format, of which config.json says nothing."""
    if config.quantization == "int4":
        return f"int4 group {config.quantization_group_size}"
    if config.quantization == "int8" or (config.quantization == "fp8" and not _is_fp8(model)):
        return config.quantization
    may_be_quantized = gguf or model.quantization is not None
    return "floats" if config.quantization == "none" and may_be_quantized else "stored"


def _is_fp8(model: ModelConfig) -> bool:
    return model.quantization is not None and model.quantization.codes == "fp8"
