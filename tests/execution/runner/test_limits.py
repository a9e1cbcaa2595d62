import dataclasses
from pathlib import Path

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.models.config import ModelConfig
from penstock.execution.runner import limits
from penstock.execution.runner.cpus import default_threads
from penstock.execution.runner.limits import inflight_steps, resolve_device, resolve_limits, resolve_model_limits

CPU = torch.device("cpu")


def test_zero_and_auto_become_numbers() -> None:
    cpu = resolve_limits(EngineConfig(), CPU)
    assert (cpu.device, cpu.max_num_batched_tokens, cpu.max_num_seqs) == ("cpu", 512, 64)
    assert (cpu.max_prefill_tokens_while_decoding, cpu.memory_utilization) == (64, 0.5)
    assert cpu.threads == default_threads() >= 1
    gpu = resolve_limits(EngineConfig(), torch.device("cuda"))
    assert (gpu.device, gpu.max_num_batched_tokens, gpu.max_num_seqs) == ("cuda", 8192, 256)
    assert (gpu.max_prefill_tokens_while_decoding, gpu.memory_utilization) == (1024, 0.9)


def test_ranks_of_one_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "default_threads", lambda: 6)
    for ranks, threads in ((1, 6), (2, 3), (4, 1), (8, 1)):
        assert resolve_limits(EngineConfig(), CPU, ranks).threads == threads
    assert resolve_limits(EngineConfig(threads=5), CPU, 4).threads == 5


def test_given_values_stay() -> None:
    config = EngineConfig(
        threads=3,
        memory_utilization=0.25,
        max_num_batched_tokens=7,
        max_num_seqs=9,
        max_prefill_tokens_while_decoding=5,
        device="cpu",
    )
    assert resolve_limits(config, CPU) == config
    above = dataclasses.replace(config, max_prefill_tokens_while_decoding=100)
    assert resolve_limits(above, CPU).max_prefill_tokens_while_decoding == 7


def test_the_model_decides_context_and_type(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig.from_folder(checkpoint)
    half = dataclasses.replace(model, dtype=torch.bfloat16)
    cpu = resolve_limits(EngineConfig(), CPU)
    gpu = resolve_limits(EngineConfig(), torch.device("cuda"))
    assert resolve_model_limits(cpu, model).max_model_len == 512
    assert resolve_model_limits(dataclasses.replace(cpu, max_model_len=100), model).max_model_len == 100
    with pytest.raises(ConfigError, match="--max-model-len 513 is above this model's 512"):
        resolve_model_limits(dataclasses.replace(cpu, max_model_len=513), model)
    assert resolve_model_limits(gpu, half).dtype == "bfloat16"
    for has_units, expected in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(limits, "_cpu_has_bf16_units", lambda has_units=has_units: has_units)
        assert resolve_model_limits(cpu, half).dtype == expected
        assert resolve_model_limits(cpu, model).dtype == "float32"
    assert resolve_model_limits(dataclasses.replace(cpu, dtype="float16"), half).dtype == "float16"


def test_a_gpu_computes_in_the_checkpoints_type_even_if_that_is_float32(checkpoint: Path) -> None:
    model = ModelConfig.from_folder(checkpoint)
    assert model.dtype == torch.float32
    gpu = resolve_limits(EngineConfig(), torch.device("cuda"))
    assert resolve_model_limits(gpu, model).dtype == "float32"


def test_steps_overlap_on_a_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"run": True}
    monkeypatch.setattr(limits, "triton_runs_on", lambda device: kernels["run"])
    gpu = torch.device("cuda")
    for setting, on_gpu, on_cpu in (("auto", 2, 1), ("on", 2, 2), ("off", 1, 1)):
        config = EngineConfig(overlap_scheduling=setting)
        assert (inflight_steps(config, gpu), inflight_steps(config, CPU)) == (on_gpu, on_cpu)
    kernels["run"] = False
    assert inflight_steps(EngineConfig(), gpu) == 1


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_blocks_on_a_gpu_are_multiples_of_16_tokens(backend: str) -> None:
    gpu = torch.device("cuda")
    assert resolve_limits(EngineConfig(block_size=32, attention_backend=backend), gpu).block_size == 32
    with pytest.raises(ConfigError, match=r"--block-size 24: .* 16 tokens or a multiple of that"):
        resolve_limits(EngineConfig(block_size=24, attention_backend=backend), gpu)
    assert resolve_limits(EngineConfig(block_size=24, attention_backend="torch"), gpu).block_size == 24
    assert resolve_limits(EngineConfig(block_size=24), CPU).block_size == 24


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match="--device cpu"):
        resolve_device("cuda")
