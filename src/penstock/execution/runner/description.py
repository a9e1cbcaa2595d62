"""What a rank says of itself: for reports, and so that ranks that have to agree can be compared."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from penstock.core.config import EngineConfig
from penstock.core.types import ModelInfo
from penstock.execution.attention.backend import KVCacheSpec
from penstock.execution.kernels.native import isa, native_available, unavailable_reason
from penstock.execution.kernels.triton.support import interpreted, triton_unavailable_reason
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.kv_memory import KVPlan
from penstock.execution.runner.limits import runs_on_accelerator
from penstock.execution.runner.speculation import speculation_text

if TYPE_CHECKING:
    from penstock.execution.runner.worker import ModelWorker


def fingerprint(config: EngineConfig, loaded: LoadedModel, device: torch.device) -> dict[str, str]:
    """What has to be the same on all ranks, which compute the same things and must come to the same results."""
    return {
        "penstock": version("penstock"),
        "torch": str(torch.__version__),
        "device": _device_name(device) or device.type,
        "kernels": _kernels(config, device),
        "attention backend": loaded.attention_backend.name,
        "model": loaded.model_hash,
    }


def describe(worker: ModelWorker, plan: KVPlan, *, device: torch.device, graphs: str) -> ModelInfo:
    """A rank as a whole engine, with its own part's bytes. `graphs`: which CUDA graphs there are."""
    config, loaded, model = worker.config, worker.loaded, worker.loaded.config
    return ModelInfo(
        architecture=model.architecture,
        dtype=config.dtype,
        device=config.device,
        device_name=_device_name(device),
        vocab_size=model.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_ids=model.eos_token_ids,
        num_parameters=loaded.num_parameters,
        weight_bytes=loaded.weight_bytes,
        model_hash=loaded.model_hash,
        block_size=config.block_size,
        kv_cache_tokens=plan.num_blocks * config.block_size,
        kv_cache_bytes=plan.num_blocks * plan.bytes_per_block,
        swap_tokens=plan.num_host_blocks * config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        attention_backend=loaded.attention_backend.name,
        weights=loaded.quantization if loaded.quantization != "none" else _name(loaded.weight_dtype),
        kv_cache_dtype=_cache_name(loaded.cache_spec),
        kernels=_kernels(config, device),
        cuda_graphs=graphs,
        max_inflight_steps=worker.max_inflight,
        threads=config.threads if config.device == "cpu" else 0,
        tensor_parallel_size=worker.part.tensor.size,
        pipeline_parallel_size=worker.part.stage.count,
        speculation=speculation_text(config, worker.draft),
    )


def _cache_name(spec: KVCacheSpec) -> str:
    """The type of keys and values, or 'bfloat16 keys, float8_e4m3fn values'."""
    key, value = _name(spec.key_dtype), _name(spec.value_dtype)
    return value if key == value else f"{key} keys, {value} values"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    """What a GPU is called, with its compute capability; '' for a CPU."""
    if device.type == "cpu":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _kernels(config: EngineConfig, device: torch.device) -> str:
    """Whose arithmetic runs."""
    if runs_on_accelerator(config, device):
        return f"Triton {version('triton')}" + ("'s interpreter" if interpreted() else " kernels")
    if device.type != "cpu":
        return f"torch operators (no Triton kernels: {triton_unavailable_reason(device)})"
    return (
        f"native kernels ({isa()})"
        if native_available()
        else f"torch operators (no native kernels: {unavailable_reason()})"
    )
