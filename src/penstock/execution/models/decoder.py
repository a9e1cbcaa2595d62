"""What the decoder-only architectures share: the stack of layers between embedding and output head.

An architecture's own file says what its attention looks like and, where it differs, its layer; see llama.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from penstock.core.errors import ConfigError, IntegrityError
from penstock.execution.layers.embedding import LMHead, VocabEmbedding
from penstock.execution.layers.linear import Linear
from penstock.execution.layers.moe import MixtureOfExperts
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.partial import PartialModuleList
from penstock.execution.layers.rotary import RotaryEmbedding, Rotation
from penstock.execution.models.config import ModelConfig
from penstock.execution.parallel.groups import TensorParallel

if TYPE_CHECKING:
    from penstock.execution.models.native_decoder import NativeDecoder


class DecoderLayer(nn.Module):
    """Pre-norm residual layer. Names of the parts are those of the checkpoints."""

    def __init__(self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, options: LayerOptions) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.mlp = mlp

    def forward(self, residual: Tensor, delta: Tensor | None, rotation: Rotation) -> Tensor:
        """residual [T, hidden_size] and what is still to be added to it, the last layer's result (None in the first layer) → this
        layer's result. Whatever was to be added is added in place, in one pass with the norm that reads the sum."""
        attended = self.self_attn(self.input_layernorm(residual, delta), rotation)
        output: Tensor = self.mlp(self.post_attention_layernorm(residual, attended))
        return output


class Decoder(nn.Module):
    """Embedding, layers and final norm; of these, what `options.part.stage` has.

    The last stage of several holds the embedding's table where the output head is tied to it. Raises ConfigError when there are fewer
    layers than stages.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_layer: Callable[[ModelConfig, int, LayerOptions], nn.Module],
        options: LayerOptions,
    ) -> None:
        super().__init__()
        stage = options.part.stage
        if stage.count > config.num_layers:
            raise ConfigError(
                f"--pipeline-parallel-size {stage.count} is more than the model's {config.num_layers} layers; choose less."
            )
        self.stage = stage
        self.embed_tokens: VocabEmbedding | None = None
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, options, lookups=stage.is_first)
        self.layers = PartialModuleList(
            stage.layers(config.num_layers), lambda index: make_layer(config, index, options)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options) if stage.is_last else None
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, options.dtype, options.device)
        self.native: NativeDecoder | None = None

    def forward(self, input_ids: Tensor, positions: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            if self.embed_tokens is None or not self.embed_tokens.lookups:
                raise IntegrityError("a stage that is not the first was run without the residual of the one before")
            residual = self.embed_tokens(input_ids)
        if self.native is not None:
            return self.native(residual, positions)
        rotation, delta = Rotation(self.rotary, positions), None
        for layer in self.layers.values():
            delta = layer(residual, delta, rotation)
        if self.norm is not None:
            hidden: Tensor = self.norm(residual, delta)
            return hidden
        return residual if delta is None else residual.add_(delta)

    def run_natively(self, config: ModelConfig, tensor: TensorParallel) -> None:
        """Run all layers as one native call from now on, if their weights and attention are native."""
        from penstock.execution.models.native_decoder import native_decoder

        norm = None if self.norm is None else self.norm.weight.data
        self.native = native_decoder(config, list(self.layers.values()), norm, self.rotary, tensor)


class CausalLM(nn.Module):
    """A decoder with an output head.

    `packed_modules`: for each module of a checkpoint that is a part of one of ours, which one and as which shard.
    `native_layers`: the layers compute exactly what csrc/decoder.cpp does, with parts of the same names.
    `wide_keys`: keys of this architecture do not bear rounding to 8 bits, so that --kv-cache-dtype rounds values only, where the
    attention backend can do that.
    """

    native_layers: ClassVar[bool] = False
    wide_keys: ClassVar[bool] = False

    packed_modules: ClassVar[Mapping[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }

    def __init__(
        self,
        config: ModelConfig,
        make_layer: Callable[[ModelConfig, int, LayerOptions], nn.Module],
        options: LayerOptions,
    ) -> None:
        super().__init__()
        self.config = config
        self.part = options.part
        self.model = Decoder(config, make_layer, options)
        self.lm_head: LMHead | None = None
        if self.part.stage.is_last:
            tied_to = self.model.embed_tokens if config.tie_word_embeddings else None
            self.lm_head = LMHead(config.vocab_size, config.hidden_size, options, tied_to=tied_to)

    def forward(self, input_ids: Tensor, positions: Tensor, residual: Tensor | None = None) -> Tensor:
        """Token ids and positions int64 [T] → hidden states [T, hidden_size]. Needs a forward context.

        In a pipeline, the first stage takes `input_ids`, every other one the `residual` [T, hidden_size] in the type of activations that
        the stage before returned, which is overwritten. The last stage returns normalised hidden states, every other one its residual.
        """
        hidden: Tensor = self.model(input_ids, positions, residual)
        return hidden

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [M, hidden_size] → logits float32 [M, vocab_size], in `out` if that is given. In the last stage only; every rank
        of it gets all logits, the same bits."""
        if self.lm_head is None:
            raise IntegrityError("logits were asked of a pipeline stage that is not the last")
        logits: Tensor = self.lm_head(hidden, out)
        return logits

    def prepare(self, max_model_len: int) -> None:
        """Make what grows with the context long enough for all positions below `max_model_len`, so that it never moves again: recorded
        kernels read it where it is now."""
        self.model.rotary.table(max_model_len)

    def finish_loading(self) -> None:
        """Called when all weights have come. Raises IntegrityError when a layer has none."""
        self.weight_bytes()
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.finish_loading()
        if self.native_layers:
            self.model.run_natively(self.config, self.part.tensor)

    def weight_bytes(self) -> int:
        """Memory of all weights of this process in the layouts that they have now."""
        small = sum(module.weight.nbytes for module in self.modules() if isinstance(module, RMSNorm))
        large = (module for module in self.modules() if isinstance(module, (Linear, VocabEmbedding, LMHead)))
        return small + sum(module.nbytes for module in large)
