"""Checkpoints to measure with: random weights in the shape of a real model, and the same in the formats of the peers.

    MODELS/SHAPE/hf/            config.json, model.safetensors (bfloat16), tokenizer.json      all engines that read Hugging Face folders
    MODELS/SHAPE/bf16.gguf      q8_0.gguf, q4_0.gguf                                           llama.cpp
    MODELS/SHAPE/openvino-int8/ openvino-int4/ openvino-bf16/                                  OpenVINO GenAI

Everything is made once and kept; a folder or file with its final name is complete. Speed does not depend on the values of weights
as long as they are ordinary numbers, so drawing them spares a download.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock.workbench.bench.load import BenchmarkError

HERE = Path(__file__).resolve().parent
SHAPES = HERE.parent / "shapes"
ADAPTERS = HERE / "adapters"
WEIGHT_DEVIATION = 0.02
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tensor_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Llama or Qwen2 checkpoint."""
    numbers = {key: value for key, value in config.items() if isinstance(value, int)}
    hidden, inner, vocabulary = numbers["hidden_size"], numbers["intermediate_size"], numbers["vocab_size"]
    heads, kv_heads = numbers["num_attention_heads"], numbers["num_key_value_heads"]
    head_dim = hidden // heads
    widths = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(numbers["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, width in widths.items():
            shapes[f"{prefix}self_attn.{name}.weight"] = (width, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{prefix}self_attn.{name}.bias"] = (width,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def random_checkpoint(shape: str, target: Path) -> None:
    """Write a Hugging Face folder with random bfloat16 weights in a shape of benchmarks/shapes."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((SHAPES / shape / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in tensor_shapes(config).items():
        if "norm" in name:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.empty(size, dtype=torch.bfloat16).normal_(0, WEIGHT_DEVIATION, generator=generator)
    with _finished(target) as draft:
        draft.mkdir(parents=True)
        (draft / "config.json").write_text(json.dumps(config, indent=2))
        (draft / "tokenizer.json").write_text(json.dumps(letter_tokenizer(config["vocab_size"])))
        (draft / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def letter_tokenizer(vocab_size: int) -> dict[str, object]:
    """A byte-level BPE tokenizer whose every id is text: 256 bytes, then words of growing length over 26 letters.

    Random ids decode to short words, so that turning tokens into text costs what it costs with a real tokenizer.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word, letter in _words():
        if len(vocabulary) == vocab_size:
            break
        vocabulary[word + letter] = len(vocabulary)
        merges.append((word, letter))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _words() -> Iterator[tuple[str, str]]:
    """(a word that was made before, a letter to add to it), words in order of length."""
    level = list(LETTERS)
    while True:
        for word in level:
            for letter in LETTERS:
                yield word, letter
        level = [word + letter for word in level for letter in LETTERS]


class Checkpoints:
    """The checkpoints of one shape under a folder, made when they are asked for."""

    def __init__(self, shape: str, folder: Path, say: Callable[[str], None] = print) -> None:
        self.shape = shape
        self.config: dict[str, int] = json.loads((SHAPES / shape / "config.json").read_text())
        self._folder = folder / shape
        self._say = say

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        config = self.config
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        return config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * bytes_per_value

    def hugging_face(self) -> Path:
        target = self._folder / "hf"
        if not target.exists():
            self._say(f"drawing weights for {self.shape}")
            random_checkpoint(self.shape, target)
        return target

    def gguf(self, python: Path, kind: str) -> Path:
        """kind: 'bf16', 'q8_0' or 'q4_0'; python: an interpreter with gguf and llama-cpp-python."""
        target = self._folder / f"{kind}.gguf"
        source = self.hugging_face() if kind == "bf16" else self.gguf(python, "bf16")
        return self._convert(python, "convert_gguf.py", source, target, kind)

    def openvino(self, python: Path, kind: str) -> Path:
        """kind: 'bf16', 'int8' or 'int4'; python: an interpreter with optimum-intel."""
        target = self._folder / f"openvino-{kind}"
        return self._convert(python, "convert_openvino.py", self.hugging_face(), target, kind)

    def _convert(self, python: Path, script: str, source: Path, target: Path, kind: str) -> Path:
        if target.exists():
            return target
        self._say(f"converting {self.shape} to {target.name}")
        with _finished(target) as draft:
            command = [str(python), str(ADAPTERS / script), str(source), str(draft), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BenchmarkError(f"{script} {kind} fails: {' | '.join(done.stderr.strip().splitlines()[-3:])}")
        return target


class _finished:
    """A context that gives a draft's path and renames it to the target when all went well, so that what exists is complete."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._draft = target.with_name(f"{target.stem}.draft{target.suffix}")

    def __enter__(self) -> Path:
        self._remove()
        self._draft.parent.mkdir(parents=True, exist_ok=True)
        return self._draft

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            os.replace(self._draft, self._target)
        else:
            self._remove()

    def _remove(self) -> None:
        if self._draft.is_dir():
            shutil.rmtree(self._draft)
        else:
            self._draft.unlink(missing_ok=True)
