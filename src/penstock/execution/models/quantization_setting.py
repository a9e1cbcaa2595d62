"""What --quantization means for a checkpoint."""

from __future__ import annotations

from pathlib import Path

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.loader import Rounding
from penstock.execution.quantization.rounding import RoundingScheme

_ROUNDING_SETTINGS = ("int8", "int4")
_FORMAT_SETTINGS = ("awq", "gptq")


def check_quantization(config: EngineConfig, model: ModelConfig, folder: Path) -> None:
    """Raise ConfigError when --quantization asks for what the checkpoint in `folder` is not."""
    setting = config.quantization
    method = None if model.quantization is None else model.quantization.method
    if setting in _FORMAT_SETTINGS and method != setting:
        found = "is not quantised" if method is None else f"has the format {method}"
        raise ConfigError(f"--quantization {setting} needs a checkpoint in that format, but {folder} {found}.")
    if setting in _ROUNDING_SETTINGS and method is not None:
        raise ConfigError(
            f"--quantization {setting} rounds plain weights, but {folder} is quantised already ({method}); "
            f"drop --quantization, or give the unquantised model."
        )


def weight_rounding(config: EngineConfig, model: ModelConfig) -> Rounding | None:
    """How float weights are rounded while they are loaded.

    int8 and int4 take all linear layers and the output head, the head always to 8 bits. Dummy weights in the shape of a quantised
    checkpoint are rounded as that is, head excepted.
    """
    if config.quantization in _ROUNDING_SETTINGS:
        layers = RoundingScheme(8 if config.quantization == "int8" else 4, config.quantization_group_size)
        return Rounding({"linear": layers, "head": RoundingScheme(8)}, f"--quantization {config.quantization}")
    if config.load_format == "dummy" and model.quantization is not None and config.quantization != "none":
        bits, group_size = model.quantization.bits or 4, model.quantization.group_size or 128
        return Rounding({"linear": RoundingScheme(bits, group_size)}, "--load-format dummy")
    return None
