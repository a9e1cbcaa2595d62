"""Which architectures exist, and `load_model`, which builds one and fills it with weights."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from penstock.core.config import EngineConfig
from penstock.execution.attention.backend import (
    AttentionBackend,
    KVCacheSpec,
    cache_spec,
    check_cache,
    get_attention_backend,
)
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.triton.support import triton_runs_on
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.dummy import DummySource
from penstock.execution.models.loader import (
    LoadOptions,
    checkpoint_shapes,
    count_parameters,
    load_weights,
    native_weights,
    packed_weights_fit,
)
from penstock.execution.models.quantization_setting import check_quantization, precision_key, weight_rounding
from penstock.execution.models.source import GGUF_FILE, WeightSource, checkpoint_files, open_source
from penstock.execution.parallel.groups import WHOLE_MODEL, ModelPart
from penstock.execution.parallel.sharding import local_heads
from penstock.execution.quantization.weight_cache import PendingCache, WeightCache, content_key, default_folder

logger = logging.getLogger(__name__)

_HOST = torch.device("cpu")

# model_type → "module:class"; imported when a checkpoint asks for it.
ARCHITECTURES = {
    "llama": "penstock.execution.models.llama:LlamaForCausalLM",
    "mistral": "penstock.execution.models.mistral:MistralForCausalLM",
    "mixtral": "penstock.execution.models.mixtral:MixtralForCausalLM",
    "qwen2": "penstock.execution.models.qwen2:Qwen2ForCausalLM",
    "qwen3": "penstock.execution.models.qwen3:Qwen3ForCausalLM",
    "qwen3_moe": "penstock.execution.models.qwen3_moe:Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    attention_backend: the one that its layers call; KV caches come from it, one of `cache_spec` per layer.
    activation_dtype: the type of hidden states, and of keys and values on their way to the cache.
    weight_dtype: the type in which weights that are not quantised are kept.
    quantization: in which precision weights are, such as 'int4 group 32, head int8'; 'none' when all are floats.
    model_hash: sha256 over config.json, the names and sizes of the weight files and what --quantization makes of them; with dummy weights
    'dummy', the seed and such a hash.
    num_parameters: as in the checkpoint, tied weights counted once. weight_bytes: what they take in memory.
    part: what of the model this is. num_layers: how many layers that has. model_hash, num_parameters and config are the whole model's,
    cache_spec, quantization and weight_bytes are the part's.
    pending_cache: packed weights that are worth keeping on disk; None when there is nothing to write. Call its
    `write_in_background` after the start.
    """

    model: CausalLM
    config: ModelConfig
    attention_backend: AttentionBackend
    cache_spec: KVCacheSpec
    activation_dtype: torch.dtype
    weight_dtype: torch.dtype
    quantization: str
    model_hash: str
    num_parameters: int
    weight_bytes: int
    part: ModelPart
    num_layers: int
    pending_cache: PendingCache | None = None


def load_model(
    config: EngineConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    part: ModelPart = WHOLE_MODEL,
) -> LoadedModel:
    """Build the model in `folder` and load its weights, computing in `dtype` on `device`; of all that only `part`.

    `config` gives load_format, attention_backend, seed and everything about quantisation. `progress` shows a bar on stderr. Raises
    ModelFormatError when the folder cannot be used and ConfigError when --quantization does not fit it or the model cannot be divided as
    `part` says. Takes no more memory than the finished weights and one layer.

    With native CPU kernels activations are float32 whatever `dtype` is; bfloat16 then means that float weights are kept in it and that
    products may use the processor's bfloat16 units. --quantization int4 rounds the output head to 8 bits, which costs little time and
    keeps the choice of the next token exact; a tied embedding is looked up in the rounded head, an untied one keeps its type.
    """
    model_config = ModelConfig.from_folder(folder)
    options, spec = _layer_options(config, model_config, device, dtype, part)
    accelerated = options.triton or device.type != "cpu"
    check_quantization(config, model_config, folder, accelerated=accelerated)
    model = build_model(model_config, options)
    # Not for computing: it says what tensors there are, and gets none.
    whole = model if _is_whole(part) else build_model(model_config, replace(options, part=WHOLE_MODEL, device=_HOST))
    files, source = _weights(config, model_config, folder, whole)
    cache = _weight_cache(config, model_config, options, folder, files)
    packed = {} if cache is None else cache.read(options.bf16_arithmetic)
    if not packed_weights_fit(model, packed):
        logger.warning("cached weights are not used: %s belongs to another model", cache)
        packed = {}
    load_options = LoadOptions(
        rounding=weight_rounding(config, model_config, device),
        dequantize=config.quantization == "none",
        widened=_name(options.widened_dtype) if options.native else None,
        packed=packed,
        progress=progress,
    )
    census = load_weights(model, source, load_options, whole)
    model.finish_loading()
    gguf = any(file.name == GGUF_FILE for file in files)
    return LoadedModel(
        model=model,
        config=model_config,
        attention_backend=options.attention_backend,
        cache_spec=spec,
        activation_dtype=options.dtype,
        weight_dtype=(options.weight_dtype or model_config.dtype) if options.native else options.dtype,
        quantization=census.text(None if options.native or options.triton else _name(options.dtype)),
        model_hash=(f"dummy-{config.seed}-" if config.load_format == "dummy" else "")
        + _hash_files(folder, files, precision_key(config, model_config, gguf=gguf)),
        num_parameters=count_parameters(whole),
        weight_bytes=model.weight_bytes(),
        part=part,
        num_layers=len(part.stage.layers(model_config.num_layers)),
        pending_cache=None if cache is None or packed else cache.pending(native_weights(model)),
    )


def build_model(config: ModelConfig, options: LayerOptions) -> CausalLM:
    """The model for `config` with uninitialised weights."""
    model: CausalLM = _architecture(config)(config, options)
    return model.eval()


def _architecture(config: ModelConfig) -> Any:
    """The class of the model, a CausalLM that is made from config and options."""
    module_name, class_name = ARCHITECTURES[config.model_type].split(":")
    return getattr(import_module(module_name), class_name)


def _layer_options(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype, part: ModelPart
) -> tuple[LayerOptions, KVCacheSpec]:
    """How layers are built, and what a KV cache of one of them holds."""
    native = device.type == "cpu" and native_available() and config.attention_backend != "triton"
    activation_dtype = torch.float32 if native else dtype
    num_heads, num_kv_heads = local_heads(model.num_heads, model.num_kv_heads, part.tensor.rank, part.tensor.size)
    wide_keys: bool = _architecture(model).wide_keys and not native

    def spec_for(arithmetic: torch.dtype) -> KVCacheSpec:
        return cache_spec(
            config.kv_cache_dtype,
            arithmetic,
            block_size=config.block_size,
            num_kv_heads=num_kv_heads,
            head_dim=model.head_dim,
            wide_keys=wide_keys,
        )

    backend = get_attention_backend(
        config.attention_backend,
        device,
        spec=spec_for(dtype),
        arithmetic=activation_dtype,
        num_heads=num_heads,
        graphs=not config.enforce_eager,
    )
    # Native attention converts from any type; torch's computes in the cache's type, so that keys and values must have it.
    spec = spec_for(activation_dtype if backend.name == "torch" else dtype)
    check_cache(backend, spec, activation_dtype)
    if spec.key_dtype != spec.value_dtype:
        logger.info(
            "--kv-cache-dtype %s rounds values only: keys stay %s, because those of a %s model do not bear 8 bits",
            config.kv_cache_dtype,
            _name(spec.key_dtype),
            model.model_type,
        )
    options = LayerOptions(
        dtype=activation_dtype,
        device=device,
        attention_backend=backend,
        native=native,
        triton=backend.name == "triton" or (device.type == "cuda" and triton_runs_on(device)),
        weight_dtype=dtype if native and dtype != torch.float32 else None,
        # The checkpoint's own type is what it means its weights to be multiplied in.
        widened_dtype=model.dtype if dtype == torch.float32 else dtype,
        bf16_arithmetic=native and dtype == torch.bfloat16,
        part=part,
    )
    return options, spec


def _weights(
    config: EngineConfig, model: ModelConfig, folder: Path, whole: CausalLM
) -> tuple[list[Path], WeightSource]:
    """The files that hold the weights of the `whole` model, and what reads them; no files with dummy weights."""
    if config.load_format == "dummy":
        return [], DummySource(checkpoint_shapes(whole), model.dtype, config.seed)
    return checkpoint_files(folder), open_source(folder, model.quantization)


def _weight_cache(
    config: EngineConfig, model: ModelConfig, options: LayerOptions, folder: Path, files: list[Path]
) -> WeightCache | None:
    """Where the packed weights of this load are kept; None when that is switched off, or there are none.

    Native layers turn 8-bit floats and codebooks into wider floats: reading those from disk would take longer than making them again.
    """
    if not config.weight_cache or not options.native:
        return None
    if model.quantization is not None and model.quantization.codes != "integers":
        return None
    settings: dict[str, Any] = {
        "quantization": config.quantization,
        "group_size": config.quantization_group_size if config.quantization == "int4" else None,
        "weight_dtype": str(options.weight_dtype),
        "dummy_seed": config.seed if config.load_format == "dummy" else None,
    }
    if not _is_whole(options.part):
        tensor, stage = options.part.tensor, options.part.stage
        settings["part"] = [tensor.rank, tensor.size, stage.index, stage.count]
    return WeightCache(default_folder(), content_key(folder / "config.json", files, settings))


def _is_whole(part: ModelPart) -> bool:
    return part.tensor.size == 1 and part.stage.count == 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hash_files(folder: Path, files: list[Path], precision: str) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(files):
        digest.update(f"\0{file.name}\0{file.stat().st_size}".encode())
    digest.update(f"\0{precision}".encode())
    return digest.hexdigest()
