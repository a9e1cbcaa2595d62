"""What 'auto' and 0 mean: every setting that depends on the machine or the model, resolved before anything is allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from penstock.core.config import DType, EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.kernels.triton.support import triton_runs_on
from penstock.execution.models.config import ModelConfig
from penstock.execution.runner.cpus import default_threads

_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On a CPU a step of 512 tokens already keeps all cores busy, and a longer one only delays everyone's next token.
_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MEMORY_UTILIZATION = {"cpu": 0.5, "cuda": 0.9}
# Steps in flight with overlap: one that runs, and the next, prepared and waiting in the device's queue. A third would only be decided on
# older news.
_OVERLAPPED = 2
# Tokens that GPU attention takes at once; a block is a whole number of them.
_GPU_BLOCK_MULTIPLE = 16


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name` of a rank, which is number `local_rank` on its machine; 'auto' is a GPU if there is one. Makes a GPU the
    current one. Raises ConfigError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch.")
    if name != "cuda" or not local_rank:
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank + 1} of this machine has no GPU: there are {torch.cuda.device_count()}; lower --tensor-parallel-size, "
            "--pipeline-parallel-size or --local-ranks."
        )
    torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank)


def resolve_limits(config: EngineConfig, device: torch.device, local_ranks: int = 1) -> EngineConfig:
    """`config` with device, threads, memory share, token budget, request limit and prefill cap replaced by numbers.

    The cores of this machine are divided among its `local_ranks` ranks, unless --threads says how many each takes. What depends on the
    model (dtype, max_model_len) stays; see `resolve_model_limits`. Raises ConfigError for blocks that the device's attention cannot take.
    """
    _check_block_size(config, device)
    budget = config.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS[device.type]
    return dataclasses.replace(
        config,
        device=device.type,
        threads=config.threads or max(1, default_threads() // local_ranks),
        memory_utilization=config.memory_utilization or _MEMORY_UTILIZATION[device.type],
        max_num_batched_tokens=budget,
        max_num_seqs=config.max_num_seqs or _MAX_NUM_SEQS[device.type],
        max_prefill_tokens_while_decoding=min(budget, config.max_prefill_tokens_while_decoding or max(1, budget // 8)),
    )


def resolve_model_limits(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """`config`, whose device is resolved, with dtype and max_model_len replaced by the model's.

    Raises ConfigError when max_model_len is above what the model was made for.
    """
    longest = model.max_model_len
    if config.max_model_len > longest:
        raise ConfigError(f"--max-model-len {config.max_model_len} is above this model's {longest} tokens; lower it.")
    return dataclasses.replace(
        config,
        max_model_len=config.max_model_len or longest,
        dtype=config.dtype if config.dtype != "auto" else _auto_dtype(config.device, model.dtype),
    )


def runs_on_accelerator(config: EngineConfig, device: torch.device) -> bool:
    """Whether steps go on behind the host's back: on a GPU with Triton kernels, and on a CPU where their interpreter stands for one."""
    return triton_runs_on(device) and (device.type != "cpu" or config.attention_backend == "triton")


def inflight_steps(config: EngineConfig, device: torch.device) -> int:
    """How many steps may be submitted before the first is done."""
    if config.overlap_scheduling == "auto":
        return _OVERLAPPED if device.type != "cpu" and runs_on_accelerator(config, device) else 1
    return _OVERLAPPED if config.overlap_scheduling == "on" else 1


def torch_dtype(name: DType) -> torch.dtype:
    """The torch type of a resolved `dtype` setting."""
    return _DTYPES[name]


def _check_block_size(config: EngineConfig, device: torch.device) -> None:
    on_gpu = device.type != "cpu" or config.attention_backend == "triton"
    if on_gpu and config.attention_backend != "torch" and config.block_size % _GPU_BLOCK_MULTIPLE:
        raise ConfigError(
            f"--block-size {config.block_size}: attention on a GPU takes blocks of {_GPU_BLOCK_MULTIPLE} tokens or a multiple of that."
        )


def _auto_dtype(device: str, stored: torch.dtype) -> DType:
    """A GPU computes in the checkpoint's type, float32 included, a CPU in float32 unless it has units for the checkpoint's bfloat16."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if device == "cuda":
        return names[stored]
    return "bfloat16" if stored is torch.bfloat16 and _cpu_has_bf16_units() else "float32"


def _cpu_has_bf16_units() -> bool:
    """x86: AVX512-BF16 or AMX, as the kernel reports them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    for line in info.read_text().splitlines():
        if line.startswith("flags"):
            flags = line.split()
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return False
