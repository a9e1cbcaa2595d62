"""What a model folder says about how its weights are quantised: `quantization_config` in config.json, or a file that older tools wrote."""

from __future__ import annotations

from pathlib import Path

from penstock.execution.models.fields import Fields
from penstock.execution.quantization.registry import QUANTIZATION_METHODS, CheckpointQuantization

# Older tools wrote a file of their own instead of a section of config.json.
_SEPARATE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

_PACKED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
_STRATEGIES = ("group", "channel", "tensor")


def read_quantization(folder: Path, config: Fields) -> CheckpointQuantization | None:
    """How the checkpoint in `folder` is quantised; None when it is not. `config`: its config.json.

    Raises ModelFormatError, naming the field, for formats that cannot be read and for numbers that would have to be ignored.
    """
    for section in ("quantization_config", "compression_config"):
        if config.present(section):
            return _parse(config.section(section), default_method=None)
    for name, method in _SEPARATE_FILES.items():
        if (folder / name).is_file():
            return _parse(Fields.from_file(folder / name), default_method=method)
    return None


def _parse(fields: Fields, default_method: str | None) -> CheckpointQuantization:
    method = fields.string("quant_method", default_method)
    if method == "awq":
        return _awq(fields)
    if method == "gptq":
        return _gptq(fields)
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    fields.fail("quant_method", f"{method!r} is not supported; supported: {', '.join(QUANTIZATION_METHODS)}")


def _awq(fields: Fields) -> CheckpointQuantization:
    bits = fields.integer("bits", fields.integer("w_bit", 4))
    if bits != 4:
        fields.fail("bits", f"{bits} is not supported; AWQ checkpoints have 4")
    version = fields.string("version", "gemm")
    if version.lower() != "gemm":
        fields.fail("version", f"{version!r} is not supported; supported: 'gemm', which is what nearly all have")
    if not fields.boolean("zero_point", True):
        fields.fail("zero_point", "must be true")
    return CheckpointQuantization(method="awq", bits=bits, group_size=_group_size(fields))


def _gptq(fields: Fields) -> CheckpointQuantization:
    bits = fields.integer("bits")
    if bits not in (4, 8):
        fields.fail("bits", f"{bits} is not supported; supported: 4 and 8")
    name = "checkpoint_format" if fields.present("checkpoint_format") else "format"
    form = fields.string(name, "gptq")
    if form not in ("gptq", "gptq_v2"):
        fields.fail(name, f"{form!r} is not supported; supported: gptq, gptq_v2")
    if fields.string("pack_dtype", "int32") != "int32":
        fields.fail("pack_dtype", "only 'int32' is supported")
    shift = 1 if form == "gptq" else 0
    return CheckpointQuantization(method="gptq", bits=bits, group_size=_group_size(fields), zero_shift=shift)


def _group_size(fields: Fields) -> int | None:
    size = fields.integer("group_size", fields.integer("q_group_size", -1, minimum=-1), minimum=-1)
    if size == 0:
        fields.fail("group_size", "must be above 0, or -1 for whole rows")
    return None if size == -1 else size


def _compressed_tensors(fields: Fields) -> CheckpointQuantization:
    form = fields.string("format", "pack-quantized")
    if form not in _PACKED_FORMATS:
        fields.fail("format", f"{form!r} is not supported; supported: {', '.join(_PACKED_FORMATS)}")
    status = fields.string("quantization_status", "compressed")
    if status != "compressed":
        fields.fail("quantization_status", f"must be 'compressed', not {status!r}; save the model compressed")
    if fields.section("sparsity_config").string("format", "dense") != "dense":
        fields.fail("sparsity_config", "sparse weights are not supported")
    for name, what in (("kv_cache_scheme", "a quantised KV cache"), ("transform_config", "transformed weights")):
        if fields.section(name).names():
            fields.fail(name, f"{what} in the checkpoint is not supported")
    groups = [_check_group(group) for group in fields.sections("config_groups")]
    if not groups:
        fields.fail("config_groups", "is missing or empty")
    bits, group_size = groups[0]
    if any(group != groups[0] for group in groups):
        return CheckpointQuantization(method="compressed-tensors")
    return CheckpointQuantization(method="compressed-tensors", bits=bits, group_size=group_size)


def _check_group(group: Fields) -> tuple[int, int | None]:
    """Bits and group size of a group of layers. Activations may be rounded token by token, or be left alone: that changes no weight."""
    form = group.string("format", "pack-quantized")
    if form not in _PACKED_FORMATS:
        group.fail("format", f"{form!r} is not supported; supported: {', '.join(_PACKED_FORMATS)}")
    weights = group.section("weights")
    bits = weights.integer("num_bits")
    if weights.string("type", "int") != "int" or bits not in (4, 8):
        weights.fail(
            "num_bits", f"{bits} bits of type {weights.string('type', 'int')!r} are not supported; int 4 or 8 is"
        )
    size = weights.integer("group_size", -1, minimum=-1)
    strategy = weights.string("strategy", "group" if size > 0 else "channel")
    if strategy not in _STRATEGIES:
        weights.fail("strategy", f"{strategy!r} is not supported; supported: {', '.join(_STRATEGIES)}")
    inputs = group.section("input_activations")
    if inputs.names() and not (inputs.boolean("dynamic", False) and inputs.string("type", "int") == "int"):
        group.fail("input_activations", "only activations that are rounded dynamically to integers are supported")
    if group.section("output_activations").names():
        group.fail("output_activations", "quantised outputs are not supported")
    return bits, size if size > 0 else None
