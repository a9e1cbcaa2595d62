"""Which architectures exist, and `load_model`, which builds one and fills it with weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from penstock.core.config import EngineConfig
from penstock.execution.attention.backend import AttentionBackend, get_attention_backend
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.dummy import fill_with_random_numbers
from penstock.execution.models.loader import load_weights, weight_files

# model_type → "module:class"; imported when a checkpoint asks for it.
ARCHITECTURES = {
    "llama": "penstock.execution.models.llama:LlamaForCausalLM",
    "mistral": "penstock.execution.models.mistral:MistralForCausalLM",
    "qwen2": "penstock.execution.models.qwen2:Qwen2ForCausalLM",
    "qwen3": "penstock.execution.models.qwen3:Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    attention_backend: the one that its layers call; KV caches come from it.
    model_hash: sha256 over config.json and the names and sizes of the weight files, or 'dummy' and the seed.
    num_parameters: as in the checkpoint, tied weights counted once. weight_bytes: what they take in memory.
    """

    model: CausalLM
    config: ModelConfig
    attention_backend: AttentionBackend
    model_hash: str
    num_parameters: int
    weight_bytes: int


def load_model(
    config: EngineConfig, folder: Path, device: torch.device, dtype: torch.dtype, progress: bool = True
) -> LoadedModel:
    """Build the model in `folder` and load its weights, computing in `dtype` on `device`.

    `config` gives load_format, attention_backend and seed. `progress` shows a bar on stderr. Raises ModelFormatError when the folder
    cannot be used. Takes no more memory than the weights and one layer.
    """
    model_config = ModelConfig.from_folder(folder)
    files = [] if config.load_format == "dummy" else weight_files(folder)
    backend = get_attention_backend(config.attention_backend, device)
    model = build_model(model_config, LayerOptions(dtype=dtype, device=device, attention_backend=backend))
    if config.load_format == "dummy":
        fill_with_random_numbers(model, config.seed)
        model_hash = f"dummy-{config.seed}-{_hash_files(folder, [])}"
    else:
        load_weights(model, files, progress=progress)
        model_hash = _hash_files(folder, files)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.finish_loading()
    return LoadedModel(model, model_config, backend, model_hash, num_parameters, model.weight_bytes())


def build_model(config: ModelConfig, options: LayerOptions) -> CausalLM:
    """The model for `config` with uninitialised weights."""
    module_name, class_name = ARCHITECTURES[config.model_type].split(":")
    model: CausalLM = getattr(import_module(module_name), class_name)(config, options)
    return model.eval()


def _hash_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(files):
        digest.update(f"\0{file.name}\0{file.stat().st_size}".encode())
    return digest.hexdigest()
