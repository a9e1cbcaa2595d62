"""Scales per group and per input feature: what they optimise, and that balancing a layer does not change what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.execution.quantization.awq_search import (
    InputStatistics,
    balance_layer,
    moment_loss,
    round_weight,
    search_input_scales,
    search_scales,
    squared_error,
    storable_scales,
)
from penstock.execution.quantization.calibration import INPUT_GROUPS, collect_statistics
from penstock.testing.checkpoints import ModelType
from tests.execution.quantization.tiny_layers import read_layer, runner_of


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: Tensor) -> InputStatistics:
    return InputStatistics(inputs.T @ inputs / len(inputs), inputs.abs().mean(0))


def test_moment_loss_is_the_error_of_the_outputs_of_each_group() -> None:
    inputs, errors = random(200, 96), random(5, 3, 32, seed=1)
    loss = moment_loss(statistics_of(inputs).moment, 32)(errors)
    for group in range(3):
        outputs = inputs[:, 32 * group : 32 * (group + 1)] @ errors[:, group].T
        torch.testing.assert_close(loss[:, group], outputs.square().mean(0), rtol=1e-4, atol=1e-5)


def test_the_best_of_all_shrinks_is_taken() -> None:
    weight = random(64, 4, 32)
    scales = search_scales(weight, 4, torch.float32, squared_error)
    widest = search_scales(weight, 4, torch.float32, squared_error, shrinks=(1.0,))
    assert (scales <= widest).all()
    assert (scales < 0.95 * widest).float().mean() > 0.3
    torch.testing.assert_close(widest, weight.abs().amax(-1) / 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_what_the_file_will_hold(dtype: torch.dtype) -> None:
    result = round_weight(random(16, 64), 4, 32, dtype)
    assert torch.equal(result.scales, result.scales.to(dtype).float())
    assert (result.dequantize() - random(16, 64)).abs().max() < 0.8


def test_a_group_of_zeros_stays_zero() -> None:
    weight = random(2, 64)
    weight[:, 32:] = 0
    result = round_weight(weight, 4, 32, torch.float16)
    assert torch.equal(result.dequantize()[:, 32:], torch.zeros(2, 32))
    # Below what float16 can hold at all.
    assert storable_scales(torch.tensor([1e-9]), torch.float16).tolist() == [1.0]


def test_inputs_that_matter_are_rounded_more_finely() -> None:
    strengths = torch.ones(64)
    strengths[::16] = 30
    inputs, weight = random(500, 64) * strengths, random(32, 64, seed=1)
    statistics = statistics_of(inputs)
    scales = search_input_scales([weight], statistics, bits=4, group_size=32, scale_dtype=torch.float32)
    assert scales[::16].min() > 2 * scales[1]

    def loss(rounded: Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    plain = loss(round_weight(weight, 4, 32, torch.float32).dequantize())
    assert loss(round_weight(weight * scales, 4, 32, torch.float32).dequantize() / scales) < 0.5 * plain


def test_equal_inputs_are_left_alone() -> None:
    statistics = InputStatistics(torch.eye(64), torch.ones(64))
    scales = search_input_scales([random(32, 64)], statistics, bits=4, group_size=32, scale_dtype=torch.float32)
    assert torch.equal(scales, torch.ones(64))


@pytest.mark.parametrize(
    ("model_type", "biased"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balancing_changes_nothing_but_scales(
    tmp_path: Path, model_type: ModelType, biased: bool, dtype: torch.dtype
) -> None:
    folder, weights = read_layer(tmp_path, model_type, attention_bias=biased, mlp_bias=biased)
    weights = {name: tensor.to(dtype).float() for name, tensor in weights.items()}
    runner = runner_of(folder)
    streams = [random(40, 64, seed=seed) * torch.linspace(0.2, 4, 64) for seed in range(4)]
    before = [runner.run(0, weights, stream) for stream in streams]
    statistics = collect_statistics(runner, 0, weights, streams)
    balanced, dtypes = dict(weights), dict.fromkeys(weights, dtype)
    balance_layer(balanced, statistics, dtypes, bits=4, group_size=32, head_dim=16)
    # Biases are stored in the checkpoint's type; everything else is exact up to float32's rounding.
    tolerance = 0.02 if biased or model_type == "qwen2" else 1e-4
    for stream, expected in zip(streams, before, strict=True):
        torch.testing.assert_close(runner.run(0, balanced, stream), expected, rtol=tolerance, atol=tolerance)
    changed = {name for name in weights if not torch.equal(weights[name], balanced[name])}
    assert {"mlp.down_proj.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight"} <= changed
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(balanced[name], balanced[name].to(dtype).float())
    after = collect_statistics(runner, 0, balanced, streams)
    for group in INPUT_GROUPS:
        torch.testing.assert_close(statistics[group].moment, after[group].moment, rtol=0.05, atol=0.02)
        torch.testing.assert_close(statistics[group].magnitude, after[group].magnitude, rtol=0.05, atol=0.02)
