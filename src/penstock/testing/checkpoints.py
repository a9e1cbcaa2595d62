"""Tiny random checkpoints in Hugging Face format, written without transformers, which loads them unchanged.

The weights are random but of a size that makes every part of the model matter in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

ModelType = Literal["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"]
StorageType = Literal["float32", "bfloat16", "float16"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Ids of the tokenizer's special tokens; 0 to 255 are the bytes.
BOS_TOKEN_ID, EOS_TOKEN_ID, USER_TOKEN_ID, ASSISTANT_TOKEN_ID = 256, 257, 258, 259
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_checkpoint(
    folder: Path,
    model_type: ModelType = "llama",
    *,
    vocab_size: int = 272,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    max_position_embeddings: int = 512,
    rope_parameters: Mapping[str, Any] | None = None,
    legacy_rope: bool = False,
    sliding_window: int | None = None,
    layer_types: Sequence[str] | None = None,
    tie_word_embeddings: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    num_experts: int = 4,
    experts_per_token: int = 2,
    expert_size: int = 48,
    norm_topk_prob: bool = True,
    mlp_only_layers: Sequence[int] = (),
    decoder_sparse_step: int = 1,
    eos_token_id: int | list[int] = EOS_TOKEN_ID,
    dtype: StorageType = "float32",
    num_shards: int = 1,
    tokenizer: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
) -> Path:
    """Write config.json, generation_config.json, safetensors and, with `tokenizer`, a byte-level tokenizer with `chat_template`.

    `rope_parameters` as transformers 5 writes them ({"rope_type": ..., "rope_theta": ..., ...}); `legacy_rope` writes them in the older
    form (`rope_theta` and `rope_scaling`). `sliding_window` sets the window of Mistral, or of the Qwen layers that `layer_types` calls
    "sliding_attention" (all layers without it). Mixtral's experts are of `intermediate_size`, those of Qwen of `expert_size`; the fields
    after that one are Qwen's alone. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = head_dim or hidden_size // num_heads
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0} | dict(rope_parameters or {})
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tie_word_embeddings,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": eos_token_id,
        "torch_dtype" if legacy_rope else "dtype": dtype,
    }
    if legacy_rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    else:
        config["rope_parameters"] = rope
    if model_type == "mixtral":
        config |= {"num_local_experts": num_experts, "num_experts_per_tok": experts_per_token}
    elif model_type == "qwen3_moe":
        config |= {
            "num_experts": num_experts,
            "num_experts_per_tok": experts_per_token,
            "moe_intermediate_size": expert_size,
            "norm_topk_prob": norm_topk_prob,
            "mlp_only_layers": list(mlp_only_layers),
            "decoder_sparse_step": decoder_sparse_step,
        }
    if model_type in ("mistral", "mixtral"):
        config["sliding_window"] = sliding_window
    elif model_type in ("qwen2", "qwen3", "qwen3_moe"):
        config["use_sliding_window"] = sliding_window is not None
        config["sliding_window"] = sliding_window
        config["max_window_layers"] = 0
        if layer_types is not None:
            config["layer_types"] = list(layer_types)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": eos_token_id})
    _write_weights(folder, _random_weights(config, seed), getattr(torch, dtype), num_shards)
    if tokenizer:
        write_byte_tokenizer(folder, chat_template)
    return folder


def write_byte_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """tokenizer.json and tokenizer_config.json: one token per byte (id = byte) and the special tokens after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", tokenizer_config)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2): itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """All tensors of the model, named as transformers names them."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.2

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + torch.randn(size, generator=generator) * 0.2

    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    qwen2, qwen3 = config["model_type"] == "qwen2", config["model_type"] in ("qwen3", "qwen3_moe")
    biased = config["attention_bias"] and (qwen3 or config["model_type"] == "llama")
    mlp_bias = config["mlp_bias"] and config["model_type"] == "llama"
    weights["model.embed_tokens.weight"] = torch.randn(config["vocab_size"], hidden, generator=generator) * 0.5
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        norm(f"{layer}.input_layernorm", hidden)
        linear(f"{layer}.self_attn.q_proj", query, hidden, biased or qwen2)
        linear(f"{layer}.self_attn.k_proj", key_value, hidden, biased or qwen2)
        linear(f"{layer}.self_attn.v_proj", key_value, hidden, biased or qwen2)
        linear(f"{layer}.self_attn.o_proj", hidden, query, biased)
        if qwen3:
            norm(f"{layer}.self_attn.q_norm", head_dim)
            norm(f"{layer}.self_attn.k_norm", head_dim)
        norm(f"{layer}.post_attention_layernorm", hidden)
        for name, outputs, inputs in _feed_forward(config, index):
            linear(f"{layer}.{name}", outputs, inputs, mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden, False)
    return weights


def _feed_forward(config: dict[str, Any], index: int) -> list[tuple[str, int, int]]:
    """Name, output and input features of the products behind the attention of layer `index`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if config["model_type"] == "mixtral":
        count, moe, names = config["num_local_experts"], "block_sparse_moe", ("w1", "w3", "w2")
    elif (
        config["model_type"] == "qwen3_moe"
        and index not in config["mlp_only_layers"]
        and (index + 1) % config["decoder_sparse_step"] == 0
    ):
        inner = config["moe_intermediate_size"]
        count, moe, names = config["num_experts"], "mlp", ("gate_proj", "up_proj", "down_proj")
    else:
        return [("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner)]
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    experts = [
        (f"{moe}.experts.{expert}.{name}", *size)
        for expert in range(count)
        for name, size in zip(names, sizes, strict=True)
    ]
    return [(f"{moe}.gate", count, hidden), *experts]


def _write_weights(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, num_shards: int) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total_size = sum(tensor.nbytes for tensor in weights.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
