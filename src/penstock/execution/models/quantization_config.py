"""What a model folder says about how its weights are quantised: `quantization_config` in config.json, or a file that older tools wrote."""

from __future__ import annotations

from pathlib import Path

from penstock.execution.models.fields import Fields
from penstock.execution.quantization.registry import QUANTIZATION_METHODS, CheckpointQuantization

# Older tools wrote a file of their own instead of a section of config.json.
_SEPARATE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_INTEGER_STRATEGIES = ("group", "channel", "tensor")
_FLOAT_STRATEGIES = (*_INTEGER_STRATEGIES, "block")

# What transformers takes when config.json names no size, and the only one on the hub.
_FP8_BLOCK = (128, 128)
# The block size of bitsandbytes' 4-bit weights unless a program asks for another; the tensors say which.
_BITSANDBYTES_GROUP = 64


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
    if method == "fp8":
        return _fp8(fields)
    if method == "bitsandbytes":
        return _bitsandbytes(fields)
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


def _fp8(fields: Fields) -> CheckpointQuantization:
    """Which layers stay floats (`modules_to_not_convert`, `ignored_layers`) is not read: their tensors have no codes."""
    form = fields.string("fmt", "e4m3")
    if form not in ("e4m3", "float8_e4m3fn"):
        fields.fail("fmt", f"{form!r} is not supported; supported: 'e4m3'")
    scheme = fields.string("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        fields.fail("activation_scheme", f"{scheme!r} is not supported; supported: dynamic, static")
    if fields.section("kv_cache_scheme").names():
        fields.fail("kv_cache_scheme", "a quantised KV cache in the checkpoint is not supported")
    block = _block(fields, "weight_block_size") if fields.present("weight_block_size") else _FP8_BLOCK
    return CheckpointQuantization(method="fp8", bits=8, codes="fp8", block=block)


def _block(fields: Fields, name: str) -> tuple[int, int]:
    sizes = fields.integers(name)
    if len(sizes) != 2 or 0 in sizes:
        fields.fail(name, f"must be two integers above 0, not {list(sizes)}")
    return sizes[0], sizes[1]


def _bitsandbytes(fields: Fields) -> CheckpointQuantization:
    if fields.boolean("load_in_8bit", fields.boolean("_load_in_8bit", False)):
        return CheckpointQuantization(method="bitsandbytes", bits=8)
    if not fields.boolean("load_in_4bit", fields.boolean("_load_in_4bit", False)):
        fields.fail("load_in_4bit", "neither load_in_4bit nor load_in_8bit is true")
    kind = fields.string("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        fields.fail("bnb_4bit_quant_type", f"{kind!r} is not supported; supported: nf4, fp4")
    return CheckpointQuantization(method="bitsandbytes", bits=4, group_size=_BITSANDBYTES_GROUP, codes="codebook")


def _group_size(fields: Fields) -> int | None:
    size = fields.integer("group_size", fields.integer("q_group_size", -1, minimum=-1), minimum=-1)
    if size == 0:
        fields.fail("group_size", "must be above 0, or -1 for whole rows")
    return None if size == -1 else size


def _compressed_tensors(fields: Fields) -> CheckpointQuantization:
    _check_format(fields)
    status = fields.string("quantization_status", "compressed")
    if status != "compressed":
        fields.fail("quantization_status", f"must be 'compressed', not {status!r}; save the model compressed")
    if fields.section("sparsity_config").string("format", "dense") != "dense":
        fields.fail("sparsity_config", "sparse weights are not supported")
    for name, what in (("kv_cache_scheme", "a quantised KV cache"), ("transform_config", "transformed weights")):
        if fields.section(name).names():
            fields.fail(name, f"{what} in the checkpoint is not supported")
    groups = [_compressed_group(group) for group in fields.sections("config_groups")]
    if not groups:
        fields.fail("config_groups", "is missing or empty")
    first = groups[0]
    if all(group == first for group in groups):
        return first
    codes = first.codes if all(group.codes == first.codes for group in groups) else "mixed"
    blocks = sorted({group.block for group in groups if group.block is not None})
    if len(blocks) > 1:
        fields.fail("config_groups", "blocks of different sizes in one checkpoint are not supported")
    return CheckpointQuantization(method="compressed-tensors", codes=codes, block=blocks[0] if blocks else None)


def _check_format(fields: Fields) -> None:
    form = fields.string("format", "pack-quantized")
    if form not in _COMPRESSED_FORMATS:
        fields.fail("format", f"{form!r} is not supported; supported: {', '.join(_COMPRESSED_FORMATS)}")


def _compressed_group(group: Fields) -> CheckpointQuantization:
    """How a group of layers is quantised."""
    _check_format(group)
    weights = group.section("weights")
    bits, kind = weights.integer("num_bits"), weights.string("type", "int")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        weights.fail("num_bits", f"{bits} bits of type {kind!r} are not supported; int 4, int 8 and float 8 are")
    size = weights.integer("group_size", -1, minimum=-1)
    strategy = weights.string("strategy", "group" if size > 0 else "channel")
    strategies = _FLOAT_STRATEGIES if kind == "float" else _INTEGER_STRATEGIES
    if strategy not in strategies:
        weights.fail("strategy", f"{strategy!r} is not supported; supported: {', '.join(strategies)}")
    _check_activations(group, kind, bits)
    return CheckpointQuantization(
        method="compressed-tensors",
        bits=bits,
        group_size=size if size > 0 else None,
        codes="fp8" if kind == "float" else "integers",
        block=_block(weights, "block_structure") if strategy == "block" else None,
    )


def _check_activations(group: Fields, kind: str, bits: int) -> None:
    """Inputs may be left alone or rounded like the weights are: to integers with a scale for each token, to 8-bit floats with any scale,
    a fixed one lies beside the weight."""
    inputs = group.section("input_activations")
    if (
        inputs.names()
        and kind == "int"
        and not (inputs.boolean("dynamic", False) and inputs.string("type", "int") == "int")
    ):
        group.fail("input_activations", "only activations that are rounded dynamically to integers are supported")
    if inputs.names() and kind == "float":
        if (inputs.string("type", "int"), inputs.integer("num_bits")) != (kind, bits):
            group.fail("input_activations", "only 8-bit floats are supported beside weights in 8-bit floats")
        if not inputs.boolean("dynamic", False) and inputs.string("strategy", "tensor") != "tensor":
            inputs.fail("strategy", "a fixed scale must be one for the whole input ('tensor')")
    if group.section("output_activations").names():
        group.fail("output_activations", "quantised outputs are not supported")
