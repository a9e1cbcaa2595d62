"""What keys and values in 8 bits cost, and which models keep their keys out of it.

Numbers are rounded by the twin of the kernel that writes the cache on a GPU; the arithmetic is torch's, in float32.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.execution.attention.backend import KVCache, KVCacheSpec, cache_spec
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.attention.torch_paged import TorchPagedAttention
from penstock.execution.attention.triton_paged import TritonPagedAttention
from penstock.execution.kernels.triton.cache_write import write_twin
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.loader import LoadOptions, load_weights
from penstock.execution.models.registry import build_model, load_model
from penstock.execution.models.source import open_source
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

CPU = torch.device("cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
FLOAT = torch.float32
EMBEDDED = Path(__file__).parents[3] / "src" / "penstock" / "assets" / "stories"

# From the generator of the training corpus, about things that it was not trained on (tools/stories, held_out).
STORIES = (
    "There once was a dreamy raccoon named Poppy who lived in a big forest. Early one spring day, Poppy left toys all over "
    "the hollow oak. She ran away and hoped that somebody else would clean up. That night Poppy could not sleep. A silver "
    "swan did not scold, but simply began to clean, slowly and alone, and Poppy felt ashamed. She took a broom, cleaned "
    "until everything shone, and asked how else she could help. And whenever the raccoon walked past the hollow oak, she "
    "remembered that responsibility means keeping the promises we make.",
    "There once was a dreamy squirrel named Ruby who lived in a hidden castle. On the first day of winter, a silver swan "
    "had no one to fetch water. Ruby sighed that it was not her job. But then she noticed how shaky the silver swan had "
    "become, and she felt ashamed. She worked until sunset, and the hug she got was better than any prize. When friends "
    'asked what had changed, Ruby smiled and said, "I learned the value of kindness."',
    "This is the story of Willa, a small and clever frog from a leafy garden. She was full of ideas, but she still had a "
    'lot to learn. One chilly autumn day, Willa met Nell the quail, who had hurt a leg near the ivy wall. "Somebody else '
    'will help," thought the frog, and looked away. But she remembered how a stranger had once helped her, and she turned '
    "around. She brought sweet pears and stayed until Nell fell asleep. Willa smiled from ear to ear. Willa now knew that "
    "kindness makes friends of strangers.",
)


class RoundedAttention(TorchPagedAttention):
    """Torch's attention over a cache that is written as the GPU's is."""

    def __init__(self, key_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
        self._key_dtype, self._value_dtype = key_dtype, value_dtype

    def allocate_kv_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        spec = dataclasses.replace(spec, key_dtype=self._key_dtype, value_dtype=self._value_dtype)
        return TritonPagedAttention().allocate_kv_cache(num_blocks, spec, device)

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        scales = kv_cache.key_scales, kv_cache.value_scales
        write_twin(key, value, kv_cache.key, kv_cache.value, *scales, slot_mapping)

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        pairs = ((kv_cache.key, kv_cache.key_scales), (kv_cache.value, kv_cache.value_scales))
        key, value = (x.float() if scales is None else x.float() * scales.unsqueeze(-1) for x, scales in pairs)
        return super().attend(query, KVCache(key, value), metadata, scale, sliding_window)


def paged_model(folder: Path, key_dtype: torch.dtype, value_dtype: torch.dtype) -> PagedModel:
    config = ModelConfig.from_folder(folder)
    backend = RoundedAttention(key_dtype, value_dtype)
    model = build_model(config, LayerOptions(dtype=FLOAT, device=CPU, attention_backend=backend))
    load_weights(model, open_source(folder, None), LoadOptions())
    loaded = load_model(EngineConfig(weight_cache=False), folder, CPU, FLOAT, progress=False)
    loaded = dataclasses.replace(loaded, model=model, attention_backend=backend, activation_dtype=FLOAT)
    return PagedModel(loaded, poison=False)


def log_likelihoods(model: PagedModel, texts: list[list[int]]) -> Tensor:
    """Of every token behind the first of its text, float64."""
    results = []
    for number, ids in enumerate(texts):
        logits = model.step({str(number): ids})[str(number)].double().log_softmax(-1)
        results.append(logits[:-1].gather(1, torch.tensor(ids[1:])[:, None]))
    return torch.cat(results)


def test_the_embedded_model_bears_8_bits() -> None:
    """Perplexity rises by less than 0.2 % (docs/quantization.md) with int8 and with 8-bit floats, but not by nothing."""
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    texts = [tokenizer.encode(f"<|begin|>{story}").ids for story in STORIES]
    exact = log_likelihoods(paged_model(EMBEDDED, FLOAT, FLOAT), texts)
    assert math.exp(-float(exact.mean())) < 2.5
    for dtype in (INT8, FP8):
        rounded = log_likelihoods(paged_model(EMBEDDED, dtype, dtype), texts)
        assert not torch.equal(rounded, exact)
        assert math.exp(float((exact - rounded).mean())) < 1.002


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_large_biases_of_keys_are_why_qwen2_keeps_them_wide(tmp_path: Path, dtype: torch.dtype) -> None:
    """As in Qwen2.5: a few numbers of each key are hundreds of times as large as the others, and nearly the same for every token. Rounding
    them hides how tokens differ in them, and, with integers, the step that they need hides all the others as well."""
    folder = write_tiny_checkpoint(tmp_path, "qwen2", num_layers=2)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("k_proj.bias"):
            # The last pair of a head of 16 numbers, which turns so slowly that its products with a query are nearly one constant.
            tensor.view(2, 16)[:, 7::8] += 300.0
    save_file(tensors, folder / "model.safetensors")
    ids = torch.randint(0, 256, (96,), generator=torch.Generator().manual_seed(2)).tolist()

    def predictions(key_dtype: torch.dtype, value_dtype: torch.dtype) -> Tensor:
        return paged_model(folder, key_dtype, value_dtype).step({"a": ids})["a"].log_softmax(-1)

    exact = predictions(FLOAT, FLOAT)
    divergences = [
        float((exact.exp() * (exact - predictions(key_dtype, dtype))).sum(-1).mean()) for key_dtype in (FLOAT, dtype)
    ]
    assert divergences[1] > 20 * divergences[0]


def spec(setting: str, arithmetic: torch.dtype, *, wide_keys: bool = False) -> tuple[torch.dtype, torch.dtype]:
    made = cache_spec(setting, arithmetic, block_size=16, num_kv_heads=2, head_dim=64, wide_keys=wide_keys)
    return made.key_dtype, made.value_dtype


def test_types_of_keys_and_values() -> None:
    half = torch.bfloat16
    assert spec("auto", half) == (half, half)
    assert spec("float16", half) == (torch.float16, torch.float16)
    assert spec("int8", half) == (INT8, INT8)
    assert spec("fp8", half) == (FP8, FP8)
    assert spec("int8", half, wide_keys=True) == (half, INT8)
    assert spec("fp8", torch.float16, wide_keys=True) == (torch.float16, FP8)
    # What is not rounded to 8 bits is not split.
    assert spec("auto", half, wide_keys=True) == (half, half)
    assert spec("bfloat16", FLOAT, wide_keys=True) == (half, half)


@pytest.mark.parametrize(
    ("model_type", "expected"), [("llama", (FP8, FP8)), ("qwen2", (torch.float16, FP8)), ("qwen3", (FP8, FP8))]
)
def test_start_up_says_which_keys_stay_wide(
    tmp_path: Path, model_type: ModelType, expected: tuple[torch.dtype, torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_checkpoint(tmp_path, model_type, num_layers=1)
    config = EngineConfig(attention_backend="triton", kv_cache_dtype="fp8", weight_cache=False)
    with caplog.at_level(logging.INFO):
        loaded = load_model(config, folder, CPU, torch.float16, progress=False)
    assert (loaded.cache_spec.key_dtype, loaded.cache_spec.value_dtype) == expected
    said = (
        "--kv-cache-dtype fp8 rounds values only: keys stay float16, because those of a qwen2 model do not bear 8 bits"
    )
    assert (said in caplog.text) is (model_type == "qwen2")
