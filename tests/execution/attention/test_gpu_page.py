"""docs/gpu.md names the backends and cache types that exist, with the bytes that they take."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.execution.attention.backend import cache_spec
from penstock.execution.attention.triton_paged import TritonPagedAttention

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "gpu.md").read_text()


def choices(setting: str) -> set[str]:
    (found,) = [field.metadata["choices"] for field in fields(EngineConfig) if field.name == setting]
    return set(found)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)[2:]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_every_backend_for_a_gpu_has_a_row() -> None:
    named = {row[0].strip("`") for row in rows("Attention backends")}
    assert named == choices("attention_backend") - {"auto", "native"}


@pytest.mark.parametrize(("setting", "head_dim"), [("auto", 128), ("int8", 64), ("fp8", 128)])
def test_cache_types_take_the_bytes_that_the_page_says(setting: str, head_dim: int) -> None:
    formulas = {row[0].strip("`"): row[1] for row in rows("Types of the KV cache")}
    assert formulas.keys() <= choices("kv_cache_dtype")
    match = re.match(r"(\d) D(?: \+ (\d+))?", formulas[setting])
    assert match is not None
    spec = cache_spec(setting, torch.bfloat16, block_size=16, num_kv_heads=2, head_dim=head_dim)
    said = int(match[1]) * head_dim + int(match[2] or 0)
    assert TritonPagedAttention().bytes_per_block(spec) == 16 * 2 * said


def test_wide_keys_take_the_bytes_that_the_page_says() -> None:
    assert "round values only: 3 D + 4 bytes" in PAGE
    spec = cache_spec("int8", torch.bfloat16, block_size=16, num_kv_heads=2, head_dim=64, wide_keys=True)
    assert TritonPagedAttention().bytes_per_block(spec) == 16 * 2 * (3 * 64 + 4)
