"""Tiny checkpoints in the formats of quantised models, packed number by number as the formats' definitions say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.testing.checkpoints import write_tiny_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Numbers:
    """One weight [N, K]: unsigned codes, scales and zero points [N, G], and the group of each input feature [K]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor

    def weight(self) -> Tensor:
        """float64 [N, K]."""
        scales, zeros = self.scales.double()[:, self.group_index], self.zeros.double()[:, self.group_index]
        return scales * (self.codes.double() - zeros)


def random_numbers(
    rows: int, columns: int, group_size: int, bits: int, *, symmetric: bool, scattered: bool, seed: int
) -> Numbers:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) * columns**-0.5 * 3 / (1 << bits)
    middle = 1 << (bits - 1)
    zeros = torch.randint(middle - 2, middle + 3, (rows, groups), generator=generator)
    index = torch.arange(columns) // group_size
    if scattered:
        index = index[torch.randperm(columns, generator=generator)]
    return Numbers(codes, scales.half(), torch.full_like(zeros, middle) if symmetric else zeros, index)


def pack(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Integers [R, C] → int32 [R, C * bits / 32], one number at a time."""
    per = 32 // bits
    packed = torch.zeros(len(values), -(-values.shape[1] // per), dtype=torch.int64)
    for column in range(packed.shape[1]):
        for place, source in enumerate(order or range(per)):
            if column * per + source < values.shape[1]:
                packed[:, column] |= values[:, column * per + source].long() << (place * bits)
    return packed.to(torch.int32)


def awq_parts(numbers: Numbers, bits: int) -> dict[str, Tensor]:
    return {
        "qweight": pack(numbers.codes.t(), bits, AWQ_ORDER),
        "qzeros": pack(numbers.zeros.t(), bits, AWQ_ORDER),
        "scales": numbers.scales.t(),
    }


def gptq_parts(numbers: Numbers, bits: int, shift: int = 1) -> dict[str, Tensor]:
    return {
        "qweight": pack(numbers.codes, bits).t(),
        "qzeros": pack(numbers.zeros.t() - shift, bits),
        "scales": numbers.scales.t(),
        "g_idx": numbers.group_index.int(),
    }


def packed_parts(numbers: Numbers, bits: int) -> dict[str, Tensor]:
    """compressed-tensors, pack-quantized."""
    parts = {
        "weight_packed": pack(numbers.codes, bits),
        "weight_scale": numbers.scales,
        "weight_shape": torch.tensor(numbers.codes.shape),
    }
    if bool((numbers.zeros != 1 << (bits - 1)).any()):
        parts["weight_zero_point"] = pack(numbers.zeros.t(), bits).t()
    if not torch.equal(numbers.group_index, numbers.group_index.sort().values):
        parts["weight_g_idx"] = numbers.group_index.int()
    return parts


def integer_parts(numbers: Numbers, bits: int) -> dict[str, Tensor]:
    """compressed-tensors, int-quantized."""
    middle = 1 << (bits - 1)
    parts = {"weight": (numbers.codes - middle).to(torch.int8), "weight_scale": numbers.scales}
    if bool((numbers.zeros != middle).any()):
        parts["weight_zero_point"] = (numbers.zeros - middle).to(torch.int8)
    return parts


def write_quantized(
    folder: Path,
    section: dict[str, Any],
    parts: Callable[[Numbers, int], dict[str, Tensor]],
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = False,
    scattered: bool = False,
    **shape: Any,
) -> dict[str, Tensor]:
    """A checkpoint whose linear layers are quantised, output head excepted, and `folder`/plain with the same weights as float32.

    Returns those weights, float64, by name.
    """

    def random(weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        size = group_size or columns
        numbers = random_numbers(rows, columns, size, bits, symmetric=symmetric, scattered=scattered, seed=seed)
        return parts(numbers, bits), numbers.weight()

    return write_replaced(folder, section, random, **shape)


def write_replaced(
    folder: Path,
    section: dict[str, Any],
    quantize: Callable[[Tensor, int], tuple[dict[str, Tensor], Tensor]],
    *,
    kept: str = "lm_head",
    **shape: Any,
) -> dict[str, Tensor]:
    """Like `write_quantized`; `quantize` takes each weight and its number, and gives the parts of it and what they stand for, float64.

    kept: modules with this in their name stay as they are.
    """
    write_tiny_checkpoint(folder, **shape)
    tensors = load_file(folder / "model.safetensors")
    expected = {name: tensor.double() for name, tensor in tensors.items()}
    linears = [name for name in tensors if name.endswith("_proj.weight") and kept not in name]
    for seed, name in enumerate(linears):
        parts, expected[name] = quantize(tensors.pop(name), seed)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    plain = write_tiny_checkpoint(folder / "plain", **shape)
    save_file({name: weight.float() for name, weight in expected.items()}, plain / "model.safetensors")
    return expected
