"""A GGUF file from the command line to the answer: the text of the checkpoint behind it, or as near to it as the format allows."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import httpx
import pytest
import torch
from safetensors.torch import save_file

from penstock import LLM, SamplingParams
from penstock.hub.resolve import embedded_model_folder
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from penstock.testing.server import RunningServer
from tests.gguf_files import QuantizationType, checkpoint_tensors, gguf_name, interleave, write_gguf

VOCAB = 272
OUTPUT_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))


def greedy(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    with LLM(str(model), dtype="float32", threads=1, kv_cache_gib=0.02) as llm:
        return [
            list(result.outputs[0].token_ids) for result in llm.generate([list(prompt) for prompt in prompts], GREEDY)
        ]


def random_prompts(count: int) -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(VOCAB - 16) for _ in range(generator.randrange(1, 80))] for _ in range(count)]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("llama", {"num_kv_heads": 1, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"dtype": "float16"}),
        ("mistral", {"sliding_window": 20}),
        ("qwen2", {"dtype": "bfloat16"}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_a_float_file_says_what_its_checkpoint_says(
    tmp_path: Path, model_type: ModelType, shape: dict[str, Any]
) -> None:
    kinds = {"float32": QuantizationType.F32, "float16": QuantizationType.F16, "bfloat16": QuantizationType.BF16}
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", model_type, vocab_size=VOCAB, tokenizer=True, **shape)

    def edit(writer: gguf.GGUFWriter) -> None:
        if "sliding_window" in shape:
            writer.add_sliding_window(shape["sliding_window"])

    file = write_gguf(folder, tmp_path / "m.gguf", quantization=kinds[shape.get("dtype", "float32")], edit=edit)
    prompts = random_prompts(6)
    assert greedy(file, prompts) == greedy(folder, prompts)


def test_llama3_scaling(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", vocab_size=VOCAB, tokenizer=True, rope_parameters=LLAMA3)
    wavelengths = 2 * torch.pi * 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    blended = 1 / ((1 - (32 / wavelengths - 1) / 3) / 8 + (32 / wavelengths - 1) / 3)
    factors = torch.where(wavelengths < 8, torch.ones(8), torch.where(wavelengths > 32, torch.full((8,), 8.0), blended))
    file = write_gguf(
        folder, tmp_path / "m.gguf", edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors.numpy())
    )
    prompts = random_prompts(6)
    assert greedy(file, prompts) == greedy(folder, prompts)


def reference_gaps(folder: Path, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[float]:
    """How far below transformers' best logit each token of `outputs` is, given what was before it; 0 where it is the best."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps: list[float] = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = reference(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)
            gaps += (logits.max(dim=1).values - chosen).tolist()
    return gaps


def write_what_the_file_says(folder: Path, file: Path, target: Path) -> Path:
    """`folder` with the weights that llama.cpp's package reads from `file`: the reference for a quantised model."""
    shutil.copytree(folder, target)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = {}
    for name, original in checkpoint_tensors(folder).items():
        tensor = stored[gguf_name(name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(original.shape)
        # Where rows were interleaved, the order is found by interleaving row numbers.
        if reader_architecture(file) == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = 4 if "q_proj" in name else 2
            numbers = interleave(torch.arange(len(values), dtype=torch.float32).numpy(), heads).astype(int)
            straight = values.copy()
            straight[numbers] = values
            values = straight
        weights[name] = torch.from_numpy(values.copy())
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def reader_architecture(file: Path) -> str:
    return str(gguf.GGUFReader(file).fields["general.architecture"].contents())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("quantization", "embedding"),
    [
        (QuantizationType.Q8_0, QuantizationType.Q8_0),
        (QuantizationType.Q4_0, QuantizationType.Q6_K),
        (QuantizationType.Q4_K, QuantizationType.Q6_K),
        (QuantizationType.Q5_0, QuantizationType.F16),
    ],
)
def test_a_quantised_file_says_what_its_weights_say(
    tmp_path: Path, model_type: ModelType, quantization: QuantizationType, embedding: QuantizationType
) -> None:
    """Kernels may round activations to 8 bits, so a token may differ where two are nearly as likely; a wrong weight differs everywhere."""
    folder = write_tiny_checkpoint(
        tmp_path / "checkpoint", model_type, vocab_size=VOCAB, hidden_size=256, intermediate_size=512, tokenizer=True
    )
    file = write_gguf(folder, tmp_path / "m.gguf", quantization=quantization, embedding=embedding)
    reference = write_what_the_file_says(folder, file, tmp_path / "reference")
    prompts = random_prompts(8)
    gaps = reference_gaps(reference, prompts, greedy(file, prompts))
    assert max(gaps) < 0.2
    assert sum(gap == 0 for gap in gaps) >= 0.9 * len(gaps)


@pytest.mark.parametrize(
    ("quantization", "most", "share"), [(QuantizationType.Q8_0, 0.1, 0.95), (QuantizationType.Q4_0, 2.0, 0.7)]
)
def test_the_embedded_model_loses_what_its_format_loses(
    tmp_path: Path, quantization: QuantizationType, most: float, share: float
) -> None:
    folder = embedded_model_folder()
    file = write_gguf(folder, tmp_path / "stories.gguf", quantization=quantization, embedding=QuantizationType.Q8_0)
    with LLM(str(file), threads=1, kv_cache_gib=0.02) as llm:
        beginnings = ["Once upon a time", "The little dog", "One day, a girl named Lily", "In the forest"]
        prompts = [llm.tokenizer.encode(text) for text in beginnings] if llm.tokenizer is not None else []
        outputs = [list(result.outputs[0].token_ids) for result in llm.generate(prompts, GREEDY)]
    gaps = reference_gaps(folder, prompts, outputs)
    assert len(gaps) == 4 * OUTPUT_TOKENS
    assert max(gaps) < most
    assert sum(gap == 0 for gap in gaps) >= share * len(gaps)


def test_serve_a_file_with_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    """The embedded model as a GGUF file answers a conversation as the embedded model does."""
    file = write_gguf(embedded_model_folder(), tmp_path / "stories.BF16.gguf", quantization=QuantizationType.BF16)
    flags = ("--kv-cache-gib", "0.05", "--threads", "1", "--dtype", "float32")
    messages = [{"role": "user", "content": "Tell me a story about a hedgehog."}]
    with RunningServer(str(file), *flags, "--served-model-name", "m", log=tmp_path / "log") as server:
        body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 30}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    with LLM("stories", dtype="float32", threads=1, kv_cache_gib=0.05) as llm:
        expected = llm.chat([messages], SamplingParams(temperature=0.0, max_tokens=30))[0]
    assert answer.json()["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert answer.json()["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert len(expected.outputs[0].text) > 50
