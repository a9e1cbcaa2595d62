"""Writes GGUF files for tests: by hand, byte by byte, and from checkpoints in Hugging Face format as llama.cpp's converter does.

`gguf`, the package of llama.cpp's authors, does the writing of whole files and the simple quantisations, so that what Penstock reads was
not written by Penstock.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

QuantizationType = gguf.GGMLQuantizationType

MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# ---- by hand ----


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, type_number: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_number) + value


def tensor_entry(name: str, dimensions: Sequence[int], type_number: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return string(name) + numbers + struct.pack("<IQ", type_number, offset)


def raw_file(
    pairs: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_pairs: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file from its parts; the counts are those of the parts unless given."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(entries) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    head += b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data


# ---- from a checkpoint ----


def write_gguf(
    folder: Path,
    file: Path,
    *,
    quantization: QuantizationType = QuantizationType.F32,
    embedding: QuantizationType | None = None,
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
    tokenizer: bool = True,
) -> Path:
    """Convert the checkpoint in `folder`. Linear weights get `quantization`, embedding and head `embedding` (the same if None), the rest
    stays float32. `edit` may add metadata or tensors before anything is written. Returns `file`."""
    config = json.loads((folder / "config.json").read_text())
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
    writer = gguf.GGUFWriter(file, architecture)
    _add_shape(writer, config)
    if tokenizer:
        add_byte_level_tokenizer(writer, folder)
    if edit is not None:
        edit(writer)
    for name, values in checkpoint_tensors(folder).items():
        target = gguf_name(name)
        if architecture == "llama" and target.split(".")[-2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if "attn_q" in target else "num_key_value_heads"]
            add_tensor(
                writer, target, interleave(values, heads), quantization if values.ndim == 2 else QuantizationType.F32
            )
        elif target in ("token_embd.weight", "output.weight"):
            add_tensor(writer, target, values, embedding or quantization)
        else:
            add_tensor(writer, target, values, quantization if values.ndim == 2 else QuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def checkpoint_tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {name: opened.get_tensor(name).to(torch.float32).numpy() for name in opened.keys()}  # noqa: SIM118


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if name.startswith("model.layers."):
        return f"blk.{parts[2]}.{MODEL_NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{MODEL_NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows as llama.cpp's rotary embedding wants them: neighbours instead of halves."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def add_tensor(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], kind: QuantizationType) -> None:
    packers = {QuantizationType.Q4_K: quantize_q4_k, QuantizationType.Q6_K: quantize_q6_k}
    data = packers[kind](values) if kind in packers else gguf.quants.quantize(values, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def _add_shape(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str = "gpt-2") -> None:
    """What the converter writes for a byte-level BPE tokenizer.json."""
    data = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = {token_id: token for token, token_id in data["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in data["added_tokens"]}
    tokens |= special
    kinds = [
        gguf.TokenType.UNUSED
        if token_id not in tokens
        else gguf.TokenType.CONTROL
        if token_id in special
        else gguf.TokenType.NORMAL
        for token_id in range(size)
    ]
    ids = {content: token_id for token_id, content in special.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(token_id, f"[PAD{token_id}]") for token_id in range(size)])
    writer.add_token_types(kinds)
    merges = data["model"]["merges"]
    # Without a merge an empty array would have no type; the format's own converter leaves the key out.
    if merges:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(ids[settings["bos_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_add_bos_token(data["post_processor"] is not None)
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


# ---- the K-quants, which the package cannot write: plain rounding, none of llama.cpp's search for better scales ----


def quantize_q4_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    blocks = values.reshape(-1, 8, 32)
    low = np.minimum(blocks.min(axis=-1), 0)
    scale = (blocks.max(axis=-1) - low) / 15
    d, scales = _shared(scale, 63)
    dmin, minima = _shared(-low, 63)
    step = d[:, None].astype(np.float32) * scales
    offset = dmin[:, None].astype(np.float32) * minima
    codes = np.rint((blocks + offset[..., None]) / np.where(step == 0, 1, step)[..., None]).clip(0, 15).astype(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    parts = [d[:, None].view(np.uint8), dmin[:, None].view(np.uint8), first, second, third, packed]
    return np.concatenate(parts, axis=1).reshape(values.shape[0], -1)


def quantize_q6_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    blocks = values.reshape(-1, 16, 16)
    d, scales = _shared(np.abs(blocks).max(axis=-1) / 31, 127)
    step = d[:, None].astype(np.float32) * scales
    codes = np.rint(blocks / np.where(step == 0, 1, step)[..., None]).clip(-32, 31).astype(np.int8) + 32
    quarters = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    first = quarters[:, :, 0] & 15 | (quarters[:, :, 2] & 15) << 4
    second = quarters[:, :, 1] & 15 | (quarters[:, :, 3] & 15) << 4
    low = np.concatenate((first, second), axis=-1)
    high = sum((quarters[:, :, index] >> 4) << 2 * index for index in range(4))
    parts = [low.reshape(-1, 128), np.asarray(high, dtype=np.uint8).reshape(-1, 64), scales, d[:, None].view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(values.shape[0], -1)


def _shared(scales: NDArray[np.float32], most: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """One float16 per block and small integers whose products come close to `scales` [B, n]."""
    d = (scales.max(axis=-1) / most).astype(np.float16)
    divisor = np.where(d == 0, 1, d).astype(np.float32)[:, None]
    return d, np.rint(scales / divisor).clip(0, most).astype(np.uint8)
