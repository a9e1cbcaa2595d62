"""config.json and generation_config.json from a GGUF file's metadata: what llama.cpp's converter made of them, turned back.

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the constants of llama.cpp's gguf-py. Numbers are stored as
float32 there; they are written out as the shortest decimal that is the same float32, so 1e-05 comes back as 1e-05.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.core.gguf import GGUFFile, GGUFTensor

# GGUF architecture → class name in config.json; the model_type has the architecture's name.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# The parameters of every Llama 3.1 to 3.3: original context, low and high frequency factor.
_LLAMA3_PARAMETERS = (8192, 1.0, 4.0)
_LLAMA3_TOLERANCE = 1e-5
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def model_config(parts: Sequence[GGUFFile], eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """The object of config.json. `parts` as from read_gguf_parts. Raises ModelFormatError for what no supported model has."""
    file = parts[0]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    architecture = file.string("general.architecture")
    if architecture not in ARCHITECTURES:
        file.fail("general.architecture", f"{architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if file.integer(f"{architecture}.expert_count", 0):
        file.fail(
            f"{architecture}.expert_count", "mixtures of experts are not supported in GGUF; use the safetensors model"
        )
    hidden_size = file.integer(f"{architecture}.embedding_length", minimum=1)
    num_heads = file.integer(f"{architecture}.attention.head_count", minimum=1)
    head_dim = _head_dim(file, architecture, hidden_size, num_heads)
    context = file.integer(f"{architecture}.context_length", minimum=1)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": _vocab_size(file, tensors, hidden_size),
        "hidden_size": hidden_size,
        "intermediate_size": file.integer(f"{architecture}.feed_forward_length", minimum=1),
        "num_hidden_layers": file.integer(f"{architecture}.block_count", minimum=1),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.integer(f"{architecture}.attention.head_count_kv", num_heads, minimum=1),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": shortest_decimal(file.number(f"{architecture}.attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope_parameters(parts, tensors, architecture, head_dim, context),
        "tie_word_embeddings": "output.weight" not in tensors,
        # Qwen 2 has biases whatever this says.
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "eos_token_id": list(eos_token_ids),
        "dtype": _dtype(tensors),
    }
    # llama.cpp applies no window to these architectures' Qwen models, and their own configurations switch it off.
    window = file.integer("llama.attention.sliding_window", 0) if architecture == "llama" else 0
    if 0 < window < context:
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return config


def shortest_decimal(value: float) -> float:
    """The number with the fewest decimal digits that is the same as `value` in float32; `value` itself if it is no float32."""
    if not math.isfinite(value) or abs(value) > 3.4e38 or struct.unpack("<f", struct.pack("<f", value))[0] != value:
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if abs(candidate) <= 3.4e38 and struct.unpack("<f", struct.pack("<f", candidate))[0] == value:
            return candidate
    return value


def _head_dim(file: GGUFFile, architecture: str, hidden_size: int, num_heads: int) -> int:
    if f"{architecture}.attention.key_length" not in file.metadata and hidden_size % num_heads:
        file.fail(
            f"{architecture}.attention.head_count", f"{num_heads} does not divide embedding_length = {hidden_size}"
        )
    head_dim = file.integer(f"{architecture}.attention.key_length", hidden_size // num_heads, minimum=1)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = file.integer(f"{architecture}.{key}", head_dim)
        if value != head_dim:
            file.fail(f"{architecture}.{key}", f"is {value}; only the size of a head, {head_dim}, is supported")
    return head_dim


def _vocab_size(file: GGUFFile, tensors: Mapping[str, GGUFTensor], hidden_size: int) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        shape = "is missing" if embedding is None else f"has shape {list(embedding.shape)}"
        file.fail(
            "tensor 'token_embd.weight'", f"{shape}; a row of embedding_length = {hidden_size} per token is needed"
        )
    return embedding.shape[0]


def _dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """The type that most bytes of the matrices have; float16 for quantised ones, whose scales are of that type."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) == 2:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return _DTYPES.get(max(sizes, key=lambda name: sizes[name]), "float16")


def _rope_parameters(
    parts: Sequence[GGUFFile], tensors: Mapping[str, GGUFTensor], architecture: str, head_dim: int, context: int
) -> dict[str, Any]:
    file = parts[0]
    theta = shortest_decimal(file.number(f"{architecture}.rope.freq_base", 10_000.0))
    if theta <= 0:
        file.fail(f"{architecture}.rope.freq_base", f"must be above 0, not {theta}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    # Files from before scaling had types: a bare factor.
    factor_key = f"{architecture}.rope.scaling.factor"
    legacy = file.number(f"{architecture}.rope.scale_linear", 1.0)
    kind = file.string(f"{architecture}.rope.scaling.type", "linear" if legacy != 1.0 else "none")
    factor = shortest_decimal(file.number(factor_key, legacy))
    # llama.cpp's converter has written 0 for "not set".
    scaled = kind != "none" and factor not in (0.0, 1.0)
    if scaled and kind not in ("linear", "yarn"):
        file.fail(f"{architecture}.rope.scaling.type", f"{kind!r} is not supported; supported: none, linear, yarn")
    if scaled and factor < 0:
        file.fail(factor_key, f"must be above 0, not {factor}")
    if "rope_freqs.weight" in tensors:
        if scaled:
            file.fail(
                "tensor 'rope_freqs.weight'", f"stands beside rope.scaling.type = {kind}; only one of them is supported"
            )
        return rope | _llama3_parameters(parts, tensors["rope_freqs.weight"], theta, head_dim)
    if scaled:
        rope |= {"rope_type": kind, "factor": factor}
    if scaled and kind == "yarn":
        rope |= _yarn_parameters(file, architecture, factor, context)
    return rope


def _yarn_parameters(file: GGUFFile, architecture: str, factor: float, context: int) -> dict[str, Any]:
    """llama.cpp multiplies YaRN's usual attention factor with `attn_factor`, where transformers takes the product."""
    prefix = f"{architecture}.rope.scaling"
    if file.number(f"{prefix}.yarn_log_multiplier", 0.0):
        file.fail(f"{prefix}.yarn_log_multiplier", "is not supported")
    original = file.integer(f"{prefix}.original_context_length", max(1, int(context / factor)), minimum=1)
    yarn: dict[str, Any] = {"original_max_position_embeddings": original}
    attention_factor = shortest_decimal(file.number(f"{prefix}.attn_factor", 1.0))
    if attention_factor != 1.0:
        yarn["attention_factor"] = attention_factor * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0)
    for name in ("beta_fast", "beta_slow"):
        if f"{prefix}.yarn_{name}" in file.metadata:
            yarn[name] = shortest_decimal(file.number(f"{prefix}.yarn_{name}"))
    return yarn


def _llama3_parameters(parts: Sequence[GGUFFile], tensor: GGUFTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters from which the factors of rope_freqs.weight [D / 2] were computed; they are not in the metadata.

    Whatever is found has to give every factor of the file again, and so the very same rotation; else the file is refused.
    """
    file = next(part for part in parts if tensor.name in part.tensors)
    factors = _read_floats(file, tensor, head_dim // 2)
    if max(factors) == 1.0 == min(factors):
        return {}
    factor = shortest_decimal(max(factors))
    wavelengths = [2 * math.pi * theta ** (2 * index / head_dim) for index in range(head_dim // 2)]
    for original, low, high in (_LLAMA3_PARAMETERS, *_llama3_estimate(wavelengths, factors)):
        computed = [_llama3_factor(length, factor, original, low, high) for length in wavelengths]
        if all(abs(a - b) <= _LLAMA3_TOLERANCE * b for a, b in zip(computed, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "original_max_position_embeddings": original,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
    file.fail(
        "tensor 'rope_freqs.weight'", "does not hold the factors of Llama 3's rope scaling, the only ones supported"
    )


def _llama3_estimate(wavelengths: Sequence[float], factors: Sequence[float]) -> list[tuple[int, float, float]]:
    """Original context, low and high frequency factor from the pairs that are neither kept nor fully stretched, if there are such.

    The three count only through their ratios, so the low factor can be 1. Then smooth, which a pair's factor tells, is a straight line:

        smooth = (original / wavelength - 1) / (high - 1)

    Its zero gives the original context. With a single point the usual ratio of 4 between high and low stands in for a second one.
    """
    most = max(factors)
    points = [
        (1 / length, (1 / value - 1 / most) / (1 - 1 / most))
        for length, value in zip(wavelengths, factors, strict=True)
        if 1 < value < most
    ]
    if not points:
        return []
    (x, smooth), (other_x, other_smooth) = points[0], points[-1]
    original = (1 + (_LLAMA3_PARAMETERS[2] - 1) * smooth) / x
    if len(points) > 1:
        zero = x - smooth * (x - other_x) / (smooth - other_smooth) if smooth != other_smooth else 0.0
        original = 1 / zero if zero > 0 else 0.0
    if not 1 <= original < 2**31:
        return []
    high = float(f"{1 + (round(original) * x - 1) / smooth:.6g}")
    return [(round(original), 1.0, high)] if high > 1 else []


def _llama3_factor(wavelength: float, factor: float, original: int, low: float, high: float) -> float:
    """By how much llama3 scaling stretches a pair that turns once in `wavelength` tokens."""
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return factor
    smooth = (original / wavelength - low) / (high - low)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _read_floats(file: GGUFFile, tensor: GGUFTensor, count: int) -> tuple[float, ...]:
    """Finite numbers above 0, of a float32 tensor [count]."""
    what = f"tensor {tensor.name!r}"
    if tensor.type.name != "F32" or tensor.shape != (count,):
        file.fail(what, f"has type {tensor.type.name} and shape {list(tensor.shape)}; F32 and [{count}] are needed")
    with file.path.open("rb") as opened:
        opened.seek(tensor.offset)
        data = opened.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        file.fail(what, "ends too early; the file became shorter while it was read")
    values: tuple[float, ...] = struct.unpack(f"<{count}f", data)
    if not all(math.isfinite(value) and value > 0 for value in values):
        file.fail(what, "holds a number that is no factor")
    return values
