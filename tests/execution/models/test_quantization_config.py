"""quantization_config: every format that is found on the hub, and every setting that would have to be ignored an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import ModelFormatError
from penstock.execution.models.config import ModelConfig
from penstock.execution.quantization.registry import CheckpointQuantization
from penstock.testing.checkpoints import write_tiny_checkpoint

AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "group_size": 128,
    "strategy": "group",
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
}
FLOATS: dict[str, Any] = WEIGHTS | {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
FLOAT_INPUTS: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
NF4: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
}
DYNAMIC: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed(*, weights: Any = WEIGHTS, inputs: Any = None, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "sparsity_config": {},
    } | changes


def read(folder: Path, section: Any, name: str = "quantization_config") -> CheckpointQuantization | None:
    write_tiny_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: section}))
    return ModelConfig.from_folder(folder).quantization


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, None),
        (AWQ, CheckpointQuantization(method="awq", bits=4, group_size=128)),
        (AWQ | {"group_size": -1, "version": "GEMM"}, CheckpointQuantization(method="awq", bits=4)),
        (GPTQ, CheckpointQuantization(method="gptq", bits=4, group_size=128, zero_shift=1)),
        (
            GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1},
            CheckpointQuantization(method="gptq", bits=8),
        ),
        (compressed(), CheckpointQuantization(method="compressed-tensors", bits=4, group_size=128)),
        (
            compressed(weights=WEIGHTS | {"num_bits": 8, "strategy": "channel", "group_size": None}, inputs=DYNAMIC),
            CheckpointQuantization(method="compressed-tensors", bits=8),
        ),
        (FP8, CheckpointQuantization(method="fp8", bits=8, codes="fp8", block=(128, 128))),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
            CheckpointQuantization(method="fp8", bits=8, codes="fp8", block=(128, 128)),
        ),
        (
            compressed(weights=FLOATS, inputs=FLOAT_INPUTS, format="float-quantized"),
            CheckpointQuantization(method="compressed-tensors", bits=8, codes="fp8"),
        ),
        (
            compressed(
                weights=FLOATS | {"strategy": "tensor"}, inputs=FLOAT_INPUTS | {"strategy": "tensor", "dynamic": False}
            ),
            CheckpointQuantization(method="compressed-tensors", bits=8, codes="fp8"),
        ),
        (
            compressed(weights=FLOATS | {"strategy": "block", "block_structure": [64, 128]}, inputs=FLOAT_INPUTS),
            CheckpointQuantization(method="compressed-tensors", bits=8, codes="fp8", block=(64, 128)),
        ),
        (
            compressed(config_groups={"a": {"weights": WEIGHTS}, "b": {"weights": FLOATS}}, format="mixed-precision"),
            CheckpointQuantization(method="compressed-tensors", codes="mixed"),
        ),
        (NF4, CheckpointQuantization(method="bitsandbytes", bits=4, group_size=64, codes="codebook")),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
            CheckpointQuantization(method="bitsandbytes", bits=8),
        ),
    ],
)
def test_what_is_read(tmp_path: Path, section: Any, expected: CheckpointQuantization | None) -> None:
    assert read(tmp_path, section) == expected


def test_older_places(tmp_path: Path) -> None:
    assert read(tmp_path / "a", compressed(), "compression_config") is not None
    for name, content, method in (
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": True}, "gptq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}, "awq"),
    ):
        folder = write_tiny_checkpoint(tmp_path / method)
        (folder / name).write_text(json.dumps(content))
        quantization = ModelConfig.from_folder(folder).quantization
        assert quantization is not None
        assert quantization.method == method
        assert quantization.group_size == (32 if method == "gptq" else 64)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "hqq"}, r"config\.json: quantization_config\.quant_method: 'hqq' is not supported; supported: awq, gptq"),
        (FP8 | {"fmt": "e5m2"}, r"fmt: 'e5m2' is not supported"),
        (FP8 | {"activation_scheme": "mixed"}, r"activation_scheme: 'mixed' is not supported"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size: must be two integers above 0"),
        (FP8 | {"weight_block_size": [0, 128]}, r"weight_block_size: must be two integers above 0"),
        (FP8 | {"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme: a quantised KV cache"),
        (NF4 | {"load_in_4bit": False, "_load_in_4bit": False}, r"load_in_4bit: neither load_in_4bit nor load_in_8bit is true"),
        (NF4 | {"bnb_4bit_quant_type": "af4"}, r"bnb_4bit_quant_type: 'af4' is not supported; supported: nf4, fp4"),
        ({}, r"quant_method: is missing"),
        (AWQ | {"version": "gemv"}, r"version: 'gemv' is not supported"),
        (AWQ | {"bits": 3}, r"bits: 3 is not supported"),
        (AWQ | {"zero_point": False}, r"zero_point: must be true"),
        (GPTQ | {"bits": 3}, r"bits: 3 is not supported; supported: 4 and 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format: 'marlin' is not supported"),
        (GPTQ | {"group_size": 0}, r"group_size: must be above 0"),
        (compressed(weights=FLOATS | {"num_bits": 4}), r"num_bits: 4 bits of type 'float' are not supported"),
        (compressed(weights=FLOATS | {"strategy": "block"}), r"weights\.block_structure: must be two integers"),
        (compressed(weights=FLOATS, inputs=DYNAMIC), r"group_0\.input_activations: only 8-bit floats"),
        (compressed(weights=FLOATS, inputs=FLOAT_INPUTS | {"dynamic": False}), r"input_activations\.strategy: a fixed scale must be one"),
        (compressed(format="nvfp4-pack-quantized"), r"format: 'nvfp4-pack-quantized' is not supported"),
        (compressed(quantization_status="frozen"), r"quantization_status: must be 'compressed'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config: sparse weights"),
        (compressed(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme: a quantised KV cache"),
        (compressed(transform_config={"config_groups": {}}), r"transform_config: transformed weights"),
        (compressed(config_groups={}), r"config_groups: is missing"),
        (compressed(weights=WEIGHTS | {"type": "float"}), r"config_groups\.group_0\.weights\.num_bits: 4 bits of type 'float'"),
        (compressed(weights=WEIGHTS | {"strategy": "block"}), r"weights\.strategy: 'block' is not supported"),
        (compressed(inputs=DYNAMIC | {"dynamic": False}), r"group_0\.input_activations: only activations"),
        (compressed(inputs=DYNAMIC | {"type": "float"}), r"group_0\.input_activations: only activations"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, section: Any, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        read(tmp_path, section)
