"""convert_gguf.py SOURCE TARGET KIND: a Hugging Face folder to a bfloat16 GGUF file, or such a file to q8_0 or q4_0.

The second step is llama.cpp's own quantisation with its defaults (Q4_0 keeps the output head in Q6_K). The file has no tokenizer: the
benchmark works with token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors_reader import read_bfloat16

FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_bfloat16(source: Path, target: Path) -> None:
    """Every tensor under llama.cpp's name for it, matrices in bfloat16, vectors in float32."""
    config = json.loads((source / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    add_metadata(writer, config)
    for name, bits in read_bfloat16(source / "model.safetensors"):
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if bits.ndim == 1:
            writer.add_tensor(new_name, (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            matrix = pair_neighbours(bits, heads)
        else:
            matrix = bits
        writer.add_tensor(new_name, matrix.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def pair_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """From halves that form pairs (Hugging Face) to neighbours that do (llama.cpp's Llama): rows of queries and keys."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))


def quantize(source: Path, target: Path, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


def main() -> None:
    source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind == "bf16":
        write_bfloat16(source, target)
    else:
        quantize(source, target, kind)


if __name__ == "__main__":
    main()
