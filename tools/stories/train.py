"""Trains the embedded story model, its tokenizer and its draft model, and writes them as Hugging Face folders.

    python tools/stories/train.py tokenizer --out src/penstock/assets/stories
    python tools/stories/train.py main  --out src/penstock/assets/stories --steps 600 --brief 0.7
    python tools/stories/train.py main  --out src/penstock/assets/stories --steps 1600 --seed 13 \
        --start src/penstock/assets/stories
    python tools/stories/train.py draft --out src/penstock/assets/stories-draft --steps 1500 --brief 0.3 \
        --tokenizer src/penstock/assets/stories

Everything is seeded; the corpus comes from ``corpus.py``.  Brief stories come first because they teach a model within
minutes to take its words from the request, which it learns late from whole ones.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import grammar
import torch
from corpus import Conversation, conversations, gibberish, word_salad
from muon import Muon
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES))
PAD_ID, BEGIN_ID, END_ID = 0, 1, 2
VOCABULARY = 4096
MAX_POSITIONS = 2048

# A message is its role token, its trimmed text and <|end|>; "developer" is another name for "system", and text parts
# of a list are joined, because that is what chat clients send.
CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}\n"
    "{%- if role not in ['system', 'user', 'assistant'] -%}\n"
    "{{- raise_exception('This model knows the roles system, user and assistant, not ' + role) -}}\n"
    "{%- endif -%}\n"
    "{{- '<|' + role + '|>' -}}\n"
    "{%- if message['content'] is string -%}\n"
    "{{- message['content'] | trim -}}\n"
    "{%- elif message['content'] -%}\n"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}\n"
    "{%- endif -%}\n"
    "{{- eos_token -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}\n"
)

# The deviation of fresh embeddings.  Twenty characters occur in the same places, so a tied embedding pulls them together;
# they must begin far enough apart for the model to tell them apart and to copy the right one.
SPREAD = 0.07


class Recipe(NamedTuple):
    """The size of a model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    seed: int
    rate: float


RECIPES = {
    "main": Recipe(hidden=192, layers=4, heads=6, kv_heads=2, mlp=512, seed=7, rate=3e-3),
    "draft": Recipe(hidden=48, layers=2, heads=2, kv_heads=2, mlp=128, seed=8, rate=8e-3),
}

# Most steps take short conversations of about the same length, one per row, so that nothing stands between a request
# and its story.  The others pack conversations into long rows and so train the long positions.
SHORT, TOKENS = 384, 1920
PACKED = {1024: 2, 2048: 1}  # row length -> rows per step

# How much a word that has to be taken from the request counts: few tokens of a story, and all that matters.
ENTITY_WEIGHT = 5.0
PRONOUN_WEIGHT = 3.0
PRONOUNS = ("he", "she", "him", "her", "his", "himself", "herself")


def train_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of ``VOCABULARY`` tokens, trained on the corpus, with its chat template."""
    rng = random.Random(3)

    def texts() -> Iterator[str]:
        for chat in islice(conversations(3), 30_000):
            yield from (message.content for message in chat)
            yield word_salad(rng, 5, 30)
            yield gibberish(rng)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD})
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Encoded(NamedTuple):
    """A conversation as token ids, and how much each counts as a target (0: nothing to learn)."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Turns conversations into token ids; the targets are the assistant's words and their <|end|>."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._role_ids = {role: self._tokenizer.token_to_id(f"<|{role}|>") for role in ROLES}
        entities = (*grammar.CHARACTERS, *grammar.MORALS, *grammar.SETTINGS)
        self._weights = {self._last_id(f" {word}"): ENTITY_WEIGHT for word in entities}
        for word in PRONOUNS:
            self._weights[self._last_id(f" {word}")] = PRONOUN_WEIGHT
            self._weights[self._last_id(f" {word.capitalize()}")] = PRONOUN_WEIGHT

    def _last_id(self, text: str) -> int:
        return self._tokenizer.encode(text, add_special_tokens=False).ids[-1]

    def encode(self, chat: Conversation) -> Encoded:
        """`chat` as the chat template renders it."""
        ids, weights = [BEGIN_ID], [0.0]
        for message in chat:
            text = self._tokenizer.encode(message.content.strip(), add_special_tokens=False).ids
            if message.role != "text":
                ids.append(self._role_ids[message.role])
                weights.append(0.0)
            ids += [*text, END_ID]
            if message.role in ("assistant", "text"):
                weights += [self._weights.get(token, 1.0) for token in text]
                weights.append(1.0)
            else:
                weights += [0.0] * (len(text) + 1)
        return Encoded(ids, weights)


class Batches:
    """Batches of whole conversations: short ones of like length side by side, or packed into long rows."""

    def __init__(self, encoder: Encoder, seed: int, brief: float) -> None:
        self._stream = (encoder.encode(chat) for chat in conversations(seed, brief))
        self._rng = random.Random(seed)
        self._short: list[Encoded] = []
        self._long: list[Encoded] = []

    def _fill(self) -> None:
        """Have a choice of short conversations."""
        while len(self._short) < 192:
            chat = next(self._stream)
            if len(chat.ids) <= max(PACKED):
                (self._short if len(chat.ids) <= SHORT else self._long).append(chat)
        self._short.sort(key=lambda chat: len(chat.ids))

    def _packed_row(self, length: int) -> Encoded:
        """One row of `length`: long conversations that fit, then short ones."""
        row = Encoded([], [])
        while True:
            room = length - len(row.ids)
            pool = next((p for p in (self._long, self._short) if any(len(chat.ids) <= room for chat in p)), None)
            if pool is None:
                return row
            chat = pool.pop(self._rng.choice([i for i, chat in enumerate(pool) if len(chat.ids) <= room]))
            row.ids.extend(chat.ids)
            row.weights.extend(chat.weights)

    def next(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights, padded to one length: packed rows of `length`, or about ``TOKENS`` short ones."""
        self._fill()
        if length in PACKED:
            rows = [self._packed_row(length) for _ in range(PACKED[length])]
        else:
            longest = self._rng.randrange(48, len(self._short))
            count = min(48, TOKENS // len(self._short[longest].ids))
            rows = self._short[longest - count + 1 : longest + 1]
            del self._short[longest - count + 1 : longest + 1]
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [PAD_ID] * (width - len(row.ids)) for row in rows])
        return ids, torch.tensor([row.weights + [0.0] * (width - len(row.weights)) for row in rows])


def shape_of(step: int) -> int:
    """The row length of a step: one in ten is 1,024, one in forty 2,048."""
    if step % 40 == 39:
        return 2048
    return 1024 if step % 10 == 4 else SHORT


def build(recipe: Recipe) -> LlamaForCausalLM:
    """A fresh Llama model of `recipe`."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        use_cache=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=SPREAD)
    return model


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        Muon(inner, lr=rate),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross entropy of the next token; the vocabulary is only computed where there is a target."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    weights = weights[:, 1:]
    wanted = weights > 0
    losses = functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


def train(options: argparse.Namespace) -> None:
    """Train one model with a cosine schedule over ``--steps`` or ``--minutes``, whichever ends first."""
    recipe = RECIPES[options.model]
    encoder = Encoder(options.tokenizer or options.out)
    model = build(recipe)
    if options.start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32).state_dict())
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.model}: {size:,} parameters, {recipe}, {options.steps} steps", flush=True)
    batches = Batches(encoder, options.seed, options.brief)
    steppers = optimizers(model, recipe.rate)
    warmup = max(20, options.steps // 50)
    began, tokens, smooth = time.monotonic(), 0, math.nan
    for step in range(options.steps):
        done = max(step / options.steps, (time.monotonic() - began) / (60 * options.minutes))
        if done >= 1:
            break
        factor = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        ids, weights = batches.next(shape_of(step))
        loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = recipe.rate * factor
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        tokens += ids.numel()
        smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % options.log_every == 0:
            spent = time.monotonic() - began
            print(
                f"step {step + 1}/{options.steps} loss {smooth:.4f} rate {recipe.rate * factor:.2e} "
                f"tokens {tokens:,} seconds {spent:.0f} tokens/s {tokens / spent:.0f}",
                flush=True,
            )
        if options.scratch and (step + 1) % options.save_every == 0:
            save(model, options.scratch, options.tokenizer or options.out, options.model)
    save(model, options.out, options.tokenizer or options.out, options.model)
    print(f"{options.model}: done, {tokens:,} tokens in {time.monotonic() - began:.0f} s", flush=True)


def save(model: LlamaForCausalLM, folder: Path, tokenizer: Path, name: str) -> None:
    """Write `model` as bf16 with its tokenizer and card: a folder that transformers loads unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        bos_token_id=BEGIN_ID, eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=True, temperature=0.7, top_p=0.95
    )
    rounded.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # Older releases of transformers look for these two under their old names.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", config | {"rope_theta": 10_000.0, "torch_dtype": "bfloat16"})
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if folder != tokenizer:
            shutil.copyfile(tokenizer / file, folder / file)
    card = Path(__file__).with_name(f"card-{name}.md")
    shutil.copyfile(card, folder / "README.md")


def main() -> None:
    """Train the tokenizer, the main model or the draft model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", choices=("tokenizer", *RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tokenizer", type=Path, help="the folder of the tokenizer, if it is not --out")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--scratch", type=Path, help="a folder for checkpoints on the way")
    parser.add_argument("--seed", type=int, default=7, help="of the conversations")
    parser.add_argument("--brief", type=float, default=0.0, help="the share of brief stories")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from, with fresh conversations")
    parser.add_argument("--minutes", type=float, default=math.inf, help="shorten the schedule to this time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    if options.model == "tokenizer":
        train_tokenizer(options.out)
    else:
        train(options)


if __name__ == "__main__":
    main()
