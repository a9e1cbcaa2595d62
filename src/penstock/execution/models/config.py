"""A model's shape, read from a Hugging Face folder's config.json and generation_config.json. Every value is checked here, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from penstock.execution.layers.rotary import ROPE_TYPES, RopeConfig, RopeType
from penstock.execution.models.fields import Fields
from penstock.execution.models.quantization_config import read_quantization
from penstock.execution.quantization.registry import CheckpointQuantization

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")

# What transformers assumes when a config.json leaves these out.
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_SLIDING_WINDOW = {"mistral": 4096, "mixtral": 4096, "qwen2": 4096, "qwen3": 4096, "qwen3_moe": 4096}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixtures of experts of a model, which stand in place of the feed-forward blocks of some layers.

    count: experts of a layer. per_token: how many of them a token goes to. intermediate_size: of one expert. renormalize: the weights of a
    token's experts add up to one; otherwise they are the shares that a softmax over all experts gave them. layers: which ones, ascending.
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalize: bool
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only model.

    model_type: the architecture's name in config.json; architecture: the class name given there.
    sliding_windows: per layer, how many tokens a token sees (itself included); None: all before it.
    max_position_embeddings: as in config.json; `max_model_len` is the usable context.
    eos_token_ids: from generation_config.json if it has them, else config.json; may be empty.
    attention_bias, mlp_bias: the flags of config.json; each architecture says which layers they concern.
    dtype: the type in which the checkpoint says it is stored, quantised weights excepted.
    quantization: how they are quantised; None in plain checkpoints.
    intermediate_size: of the feed-forward blocks that are no mixtures of experts. experts: those that are; None in dense models.
    """

    model_type: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    quantization: CheckpointQuantization | None = None
    experts: ExpertsConfig | None = None

    @property
    def sliding_window(self) -> int | None:
        """The window if every layer has the same one, else None: some layer then sees the whole context."""
        first = self.sliding_windows[0]
        return first if all(window == first for window in self.sliding_windows) else None

    @property
    def feed_forward_width(self) -> int:
        """As many numbers as a token has in the widest feed-forward block, inside and, with experts, in copies of what goes in and out."""
        if self.experts is None:
            return self.intermediate_size
        mixture = self.experts.per_token * (self.experts.intermediate_size + self.hidden_size)
        dense = self.intermediate_size if len(self.experts.layers) < self.num_layers else 0
        return max(mixture, dense)

    @property
    def max_model_len(self) -> int:
        """Longest usable context in tokens. `dynamic` and `yarn` reach `factor` times their original length."""
        if self.rope.rope_type in ("dynamic", "yarn"):
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json. Raises ModelFormatError that names the file and the field."""
        fields = Fields.from_file(folder / "config.json")
        model_type = fields.string("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            fields.fail("model_type", f"{model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}")
        if fields.string("hidden_act", "silu") != "silu":
            fields.fail("hidden_act", "only 'silu' is supported")

        num_layers = fields.integer("num_hidden_layers")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            fields.fail("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads = {num_heads}")
        max_position_embeddings = fields.integer("max_position_embeddings")
        return cls(
            model_type=model_type,
            architecture=(fields.strings("architectures") or (model_type,))[0],
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(fields, model_type, num_heads),
            vocab_size=fields.integer("vocab_size"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, max_position_embeddings),
            sliding_windows=_sliding_windows(fields, model_type, num_layers),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=fields.boolean("attention_bias", False),
            mlp_bias=fields.boolean("mlp_bias", False),
            eos_token_ids=_eos_token_ids(folder, fields),
            dtype=_dtype(fields),
            quantization=read_quantization(folder, fields),
            experts=_experts(fields, model_type, num_layers),
        )


def _head_dim(fields: Fields, model_type: str, num_heads: int) -> int:
    hidden_size = fields.integer("hidden_size")
    default = _DEFAULT_HEAD_DIM.get(model_type)
    if default is None and not fields.present("head_dim"):
        if hidden_size % num_heads:
            fields.fail("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads = {num_heads}")
        default = hidden_size // num_heads
    head_dim = fields.integer("head_dim", default)
    if head_dim % 2:
        fields.fail("head_dim", f"must be even for rotary embeddings, not {head_dim}")
    return head_dim


def _rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Newer files hold `rope_parameters`, older ones `rope_theta` and `rope_scaling` (whose type was once called `type`)."""
    name = "rope_parameters" if fields.present("rope_parameters") else "rope_scaling"
    rope = fields.section(name)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        rope.fail("rope_type", f"{rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        rope.fail("partial_rotary_factor", "partial rotation is not supported; only 1.0 is")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    original = max_position_embeddings
    if rope_type in ("llama3", "yarn"):
        original = rope.integer(
            "original_max_position_embeddings",
            fields.integer("original_max_position_embeddings", max_position_embeddings),
        )
    factor_default = max_position_embeddings / original if rope_type == "yarn" else None
    config = RopeConfig(
        rope_type=cast(RopeType, rope_type),
        theta=theta,
        factor=rope.number("factor", factor_default),
        original_max_position_embeddings=original,
        low_freq_factor=rope.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=rope.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )
    if config.high_freq_factor <= config.low_freq_factor:
        rope.fail("high_freq_factor", f"must be above low_freq_factor = {config.low_freq_factor}")
    return config


def _sliding_windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral, Mixtral: one window for all layers, Mixtral only if the file has one. Qwen: off unless `use_sliding_window`, and then layer
    by layer, but for mixtures of experts, where all layers have it. Llama: none."""
    full: tuple[int | None, ...] = (None,) * num_layers
    if model_type == "mixtral" and not fields.present("sliding_window"):
        return full
    if model_type not in _DEFAULT_SLIDING_WINDOW or fields.explicit_null("sliding_window"):
        return full
    if model_type.startswith("qwen") and not fields.boolean("use_sliding_window", False):
        return full
    window = fields.integer("sliding_window", _DEFAULT_SLIDING_WINDOW[model_type])
    if model_type in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * num_layers
    layer_types = fields.strings("layer_types")
    if not layer_types:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(layer_types) != num_layers:
        fields.fail("layer_types", f"has {len(layer_types)} entries for {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            fields.fail("layer_types", f"{layer_type!r} is not supported; supported: full_attention, sliding_attention")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _experts(fields: Fields, model_type: str, num_layers: int) -> ExpertsConfig | None:
    """Mixtral: every layer, expert weights add up to one. Qwen: every `decoder_sparse_step`-th layer but for `mlp_only_layers`."""
    if model_type == "mixtral":
        return _checked_experts(
            fields,
            count=fields.integer("num_local_experts", 8),
            per_token=fields.integer("num_experts_per_tok", 2),
            intermediate_size=fields.integer("intermediate_size"),
            renormalize=True,
            layers=tuple(range(num_layers)),
        )
    if model_type != "qwen3_moe":
        return None
    dense = fields.integers("mlp_only_layers", "the number of a layer")
    if beyond := [layer for layer in dense if layer >= num_layers]:
        fields.fail("mlp_only_layers", f"names layer {beyond[0]}, but there are {num_layers}")
    step = fields.integer("decoder_sparse_step", 1)
    # Newer files say num_local_experts.
    count_name = "num_experts" if fields.present("num_experts") else "num_local_experts"
    return _checked_experts(
        fields,
        count=fields.integer(count_name, 128),
        per_token=fields.integer("num_experts_per_tok", 8),
        intermediate_size=fields.integer("moe_intermediate_size", 768),
        renormalize=fields.boolean("norm_topk_prob", False),
        layers=tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense),
    )


def _checked_experts(
    fields: Fields, *, count: int, per_token: int, intermediate_size: int, renormalize: bool, layers: tuple[int, ...]
) -> ExpertsConfig | None:
    """None when no layer has experts."""
    if per_token > count:
        fields.fail("num_experts_per_tok", f"a token cannot go to {per_token} of {count} experts")
    if not layers:
        return None
    return ExpertsConfig(
        count=count, per_token=per_token, intermediate_size=intermediate_size, renormalize=renormalize, layers=layers
    )


def _eos_token_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    generation_file = folder / "generation_config.json"
    if generation_file.is_file():
        generation = Fields.from_file(generation_file)
        if generation.present("eos_token_id"):
            return generation.integers("eos_token_id")
    return fields.integers("eos_token_id")


def _dtype(fields: Fields) -> torch.dtype:
    name = fields.string("dtype", fields.string("torch_dtype", "float32"))
    if name not in _DTYPES:
        fields.fail("dtype", f"{name!r} is not supported; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]
