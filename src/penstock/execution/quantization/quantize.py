"""Quantises a whole checkpoint, one decoder layer at a time, and measures what that costs.

    read layer N ──▶ run the calibration windows through it ──▶ choose scales and codes ──▶ write layer N
                                                                        │
                     the windows go on to layer N + 1 through the quantised layer, so that it is calibrated with what it will see

Held-out windows flow beside them twice, through the float and through the quantised layers, and at the end give perplexity, KL
divergence and agreement. In memory are one layer, the windows' residual streams and, at either end, embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.quantized import Float8Tensor, QuantizedTensor
from penstock.execution.quantization.awq_search import InputStatistics, balance_layer, moment_loss, round_weight
from penstock.execution.quantization.calibration import (
    INPUT_GROUPS,
    LINEAR_NAMES,
    DecoderShape,
    LayerRunner,
    LayerWeights,
    Rotary,
    collect_statistics,
    rms_norm,
    round_activations,
)
from penstock.execution.quantization.fp8 import round_float8, round_inputs_to_float8
from penstock.execution.quantization.gptq_solver import solve_gptq

SCHEMES = ("int8", "fp8", "int4-rtn", "int4-awq", "int4-gptq")
GROUP_SIZES = (32, 64, 128)

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Tokens whose logits are in memory at once.
_LOGIT_ROWS = 128


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded. group_size: input features that share a scale; None: one scale per output feature.

    int8, fp8: 8 bits per output feature, integers or floats (e4m3), activations rounded likewise per token while computing (W8A8).
    int4-*: 4 bits per group, activations as they are (W4A16), codes and scales chosen by rounding to the nearest, by AWQ or by GPTQ.
    """

    name: str
    bits: int
    group_size: int | None
    activation_bits: int | None

    @property
    def floating(self) -> bool:
        """Whether numbers are rounded to floats rather than to integers."""
        return self.name == "fp8"

    @property
    def round_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to the inputs of products; None: they stay as they are."""
        if self.activation_bits is None:
            return None
        return round_inputs_to_float8 if self.floating else partial(round_activations, bits=self.activation_bits)

    @classmethod
    def named(cls, name: str, group_size: int) -> Scheme:
        """Raises ConfigError for an unknown name or group size. int8 and fp8 take no notice of `group_size`."""
        if name not in SCHEMES:
            raise ConfigError(f"--scheme must be one of {', '.join(SCHEMES)}, not {name!r}.")
        if group_size not in GROUP_SIZES:
            raise ConfigError(f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, not {group_size}.")
        return cls(name, 8, None, 8) if name in ("int8", "fp8") else cls(name, 4, group_size, None)

    @property
    def needs_calibration(self) -> bool:
        return self.name in ("int4-awq", "int4-gptq")

    def check_input_features(self, features: int, where: str) -> None:
        """Raise ConfigError, with what would do, when groups do not divide a weight's input features."""
        if self.group_size is None or features % self.group_size == 0:
            return
        fitting = [str(size) for size in GROUP_SIZES if features % size == 0]
        advice = f"use --group-size {' or '.join(fitting)}" if fitting else "use --scheme int8"
        raise ConfigError(
            f"--group-size {self.group_size} does not divide the {features} input features of {where}; {advice}."
        )


class TensorReader(Protocol):
    """A checkpoint's tensors by name. `read` gives them as stored: float32, bfloat16 or float16."""

    def names(self) -> Sequence[str]: ...
    def read(self, name: str) -> Tensor: ...


class TensorWriter(Protocol):
    """Takes the tensors of the new checkpoint under the names of the old one.

    scale_dtype: the type in which a quantised weight's scales are stored."""

    def add(self, name: str, tensor: Tensor) -> None: ...
    def add_quantized(self, name: str, tensor: QuantizedTensor | Float8Tensor, scale_dtype: torch.dtype) -> None: ...


@dataclass(frozen=True)
class Quality:
    """The quantised model beside the float one on `tokens` predicted tokens of held-out text.

    kl_divergence: mean over positions of KL(float || quantised), in nats. top1_agreement: share of positions with the same best token.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl_divergence: float
    top1_agreement: float


def quantize_checkpoint(
    reader: TensorReader,
    writer: TensorWriter,
    shape: DecoderShape,
    rotary: Rotary,
    scheme: Scheme,
    *,
    calibration: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    progress: bool = False,
) -> Quality | None:
    """Quantise the linear layers of the decoder; embedding, norms, biases and head are passed on as they are.

    calibration, held_out: windows of token ids. Returns None without held-out windows. Raises ConfigError when the scheme needs calibration
    and there is none, or its group size does not divide a weight's input features; ModelFormatError when tensors are missing.
    """
    names = _names_by_layer(reader, shape.num_layers)
    if scheme.needs_calibration and not calibration:
        raise ConfigError(f"--scheme {scheme.name} needs calibration text; give --calibration FILE.")
    work = _Work(LayerRunner(shape, rotary), scheme, calibration if scheme.needs_calibration else [], held_out)
    with torch.inference_mode():
        table = reader.read(_EMBEDDING)
        work.embed(table)
        writer.add(_EMBEDDING, table)
        del table
        for index in tqdm(range(shape.num_layers), unit="layer", desc="Quantising", disable=not progress):
            prefix = f"model.layers.{index}."
            stored = {name.removeprefix(prefix): reader.read(name) for name in names[index]}
            _check_layer(index, stored, scheme)
            work.layer(index, stored, prefix, writer)
        for name in names[None]:
            if name not in (_EMBEDDING, *_unused(shape)):
                writer.add(name, reader.read(name))
        if not held_out:
            return None
        head = reader.read(_EMBEDDING if shape.tie_word_embeddings else _HEAD)
        return work.quality(reader.read(_NORM).float(), head.float())


class _Work:
    """The residual streams of all windows between two layers, and what happens to them in one."""

    def __init__(
        self,
        runner: LayerRunner,
        scheme: Scheme,
        calibration: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
    ) -> None:
        self._runner, self._scheme = runner, scheme
        self._calibration_ids = [torch.tensor(window) for window in calibration]
        self._held_out_ids = [torch.tensor(window) for window in held_out]
        self._calibration: list[Tensor] = []
        self._float: list[Tensor] = []
        self._quantized: list[Tensor] = []

    def embed(self, table: Tensor) -> None:
        """Start all streams. table: [vocab_size, hidden_size]."""
        self._calibration = [F.embedding(ids, table).float() for ids in self._calibration_ids]
        self._float = [F.embedding(ids, table).float() for ids in self._held_out_ids]
        self._quantized = list(self._float)

    def layer(self, index: int, stored: dict[str, Tensor], prefix: str, writer: TensorWriter) -> None:
        """Quantise and write layer `index`, and take all streams through it."""
        dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        weights = {name: tensor.float() for name, tensor in stored.items()}
        self._float = [self._runner.run(index, weights, hidden) for hidden in self._float]
        statistics = collect_statistics(self._runner, index, weights, self._calibration)
        if self._scheme.name == "int4-awq":
            assert self._scheme.group_size is not None  # noqa: S101 - so it is for every 4-bit scheme
            head_dim = self._runner.shape.head_dim
            balance_layer(
                weights,
                statistics,
                dtypes,
                bits=self._scheme.bits,
                group_size=self._scheme.group_size,
                head_dim=head_dim,
            )
        for group, linears in INPUT_GROUPS.items():
            for linear in linears:
                name = f"{linear}.weight"
                quantized = self._quantize(weights[name], statistics.get(group), dtypes[name])
                weights[name] = quantized.dequantize()
                writer.add_quantized(prefix + name, quantized, dtypes[name])
        for name, tensor in weights.items():
            if name.removesuffix(".weight") not in LINEAR_NAMES:
                writer.add(prefix + name, tensor.to(dtypes[name]))
        rounding = self._scheme.round_inputs
        self._calibration = [self._runner.run(index, weights, x, round_inputs=rounding) for x in self._calibration]
        self._quantized = [self._runner.run(index, weights, x, round_inputs=rounding) for x in self._quantized]

    def _quantize(
        self, weight: Tensor, statistics: InputStatistics | None, dtype: torch.dtype
    ) -> QuantizedTensor | Float8Tensor:
        bits, group_size = self._scheme.bits, self._scheme.group_size
        if self._scheme.floating:
            return round_float8(weight, dtype)
        if group_size is None:
            # The widest number gets the widest code: with 255 steps there is nothing to win by clipping.
            return round_weight(weight, bits, weight.shape[1], dtype, shrinks=(1.0,))
        if statistics is None:
            return round_weight(weight, bits, group_size, dtype)
        if self._scheme.name == "int4-gptq":
            return solve_gptq(weight, statistics.moment, bits=bits, group_size=group_size, scale_dtype=dtype)
        return round_weight(weight, bits, group_size, dtype, moment_loss(statistics.moment, group_size))

    def quality(self, norm: Tensor, head: Tensor) -> Quality:
        """Compare the streams behind the last layer. norm: [hidden_size]; head: [vocab_size, hidden_size], both float32."""
        tokens, before, after, divergence, agreeing = 0, 0.0, 0.0, 0.0, 0
        eps = self._runner.shape.rms_norm_eps
        for ids, exact, rounded in zip(self._held_out_ids, self._float, self._quantized, strict=True):
            for start in range(0, len(ids) - 1, _LOGIT_ROWS):
                rows = slice(start, min(start + _LOGIT_ROWS, len(ids) - 1))
                targets = ids[rows.start + 1 : rows.stop + 1].unsqueeze(1)
                p, q = ((rms_norm(x[rows], norm, eps) @ head.T).log_softmax(-1) for x in (exact, rounded))
                tokens += len(targets)
                before -= float(p.gather(1, targets).double().sum())
                after -= float(q.gather(1, targets).double().sum())
                divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
                agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        exponents = torch.tensor([before, after], dtype=torch.float64) / tokens
        perplexities = exponents.exp().tolist()
        return Quality(tokens, perplexities[0], perplexities[1], divergence / tokens, agreeing / tokens)


def _names_by_layer(reader: TensorReader, num_layers: int) -> dict[int | None, list[str]]:
    """The checkpoint's names by layer; None for those outside of the layers. Raises ModelFormatError for a layer too many."""
    names: dict[int | None, list[str]] = {None: [], **{index: [] for index in range(num_layers)}}
    for name in reader.names():
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            names[None].append(name)
            continue
        if not parts[2].isdecimal() or int(parts[2]) >= num_layers:
            raise ModelFormatError(f"Unexpected tensor {name!r}: config.json says num_hidden_layers is {num_layers}.")
        # Old checkpoints hold rotary frequencies, which config.json says as well.
        if not name.endswith(".rotary_emb.inv_freq"):
            names[int(parts[2])].append(name)
    return names


def _check_layer(index: int, weights: LayerWeights, scheme: Scheme) -> None:
    needed = [f"{name}.weight" for name in (*LINEAR_NAMES, "input_layernorm", "post_attention_layernorm")]
    missing = [f"model.layers.{index}.{name}" for name in needed if name not in weights]
    if missing:
        raise ModelFormatError(f"The checkpoint lacks {', '.join(missing)}; get it again.")
    for name in LINEAR_NAMES:
        scheme.check_input_features(weights[f"{name}.weight"].shape[1], name)


def _unused(shape: DecoderShape) -> tuple[str, ...]:
    """A tied model's head is its embedding; some checkpoints hold it twice."""
    return (_HEAD,) if shape.tie_word_embeddings else ()
