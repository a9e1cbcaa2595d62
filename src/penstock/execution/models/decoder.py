"""What the decoder-only architectures share: the stack of layers between embedding and output head.

An architecture's own file says what its attention looks like and, where it differs, its layer; see llama.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from penstock.execution.layers.embedding import LMHead, VocabEmbedding
from penstock.execution.layers.linear import Linear
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.rotary import RotaryEmbedding, Rotation
from penstock.execution.models.config import ModelConfig

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
    """Embedding, layers and final norm."""

    def __init__(
        self,
        config: ModelConfig,
        make_layer: Callable[[ModelConfig, int, LayerOptions], nn.Module],
        options: LayerOptions,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, options)
        self.layers = nn.ModuleList(make_layer(config, index, options) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, options.dtype, options.device)
        self.native: NativeDecoder | None = None

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        residual: Tensor = self.embed_tokens(input_ids)
        if self.native is not None:
            return self.native(residual, positions)
        rotation, delta = Rotation(self.rotary, positions), None
        for layer in self.layers:
            delta = layer(residual, delta, rotation)
        hidden: Tensor = self.norm(residual, delta)
        return hidden

    def run_natively(self, config: ModelConfig) -> None:
        """Run all layers as one native call from now on, if their weights and attention are native."""
        from penstock.execution.models.native_decoder import native_decoder

        self.native = native_decoder(config, list(self.layers), self.norm.weight.data, self.rotary)


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
        self.model = Decoder(config, make_layer, options)
        self.lm_head = LMHead(
            config.vocab_size,
            config.hidden_size,
            options,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
        )

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions int64 [T] → hidden states [T, hidden_size]. Needs a forward context."""
        hidden: Tensor = self.model(input_ids, positions)
        return hidden

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [M, hidden_size] → logits float32 [M, vocab_size], in `out` if that is given."""
        logits: Tensor = self.lm_head(hidden, out)
        return logits

    def prepare(self, max_model_len: int) -> None:
        """Make what grows with the context long enough for all positions below `max_model_len`, so that it never moves again: recorded
        kernels read it where it is now."""
        self.model.rotary.table(max_model_len)

    def finish_loading(self) -> None:
        """Called when all weights have come. Raises IntegrityError when a layer has none."""
        self.weight_bytes()
        if self.native_layers:
            self.model.run_natively(self.config)

    def weight_bytes(self) -> int:
        """Memory of all weights in the layouts that they have now."""
        small = sum(module.weight.nbytes for module in self.modules() if isinstance(module, RMSNorm))
        linear = sum(module.nbytes for module in self.modules() if isinstance(module, Linear))
        return small + linear + self.model.embed_tokens.nbytes + self.lm_head.nbytes
