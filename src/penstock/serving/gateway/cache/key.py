"""The key of an answer: SHA-256 over everything that changes it, and over nothing else.

    fingerprint = sha256(version, served name, model info without what only says how fast or how much)
    key         = sha256(fingerprint, endpoint, sampling, prompts, the client's salt, the tenant)

Both are taken over canonical JSON: keys of objects sorted, everything else as it is, so 1, 1.0, "1" and true are four values. Fields of
SamplingParams, of ModelInfo and of prompts are taken from the types themselves, so that a field that is added later is in the key
from its first day. Stream options, user, priority and time-outs are not in the key: the answer is the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec

from penstock.core.types import ModelInfo, SamplingParams
from penstock.serving.frontend.client import Prompt

# They say how much a machine can do at once, not what it answers; `max_request_tokens`, which can end an answer, is in the key.
_WITHOUT_EFFECT = frozenset(
    {
        "num_parameters",
        "weight_bytes",
        "block_size",
        "kv_cache_tokens",
        "kv_cache_bytes",
        "swap_tokens",
        "max_num_seqs",
        "max_num_batched_tokens",
        "threads",
    }
)
_MODEL_FIELDS = (*(name for name in ModelInfo.__struct_fields__ if name not in _WITHOUT_EFFECT), "max_request_tokens")

_canonical = msgspec.json.Encoder(order="deterministic").encode
_model_values = attrgetter(*_MODEL_FIELDS)
_sampling_values = attrgetter(*SamplingParams.__struct_fields__)


@functools.lru_cache(maxsize=64)
def fingerprint(version: str, model_name: str, info: ModelInfo) -> str:
    """Names the program and the model that answer."""
    return _digest([version, model_name, list(zip(_MODEL_FIELDS, _model_values(info), strict=True))])


def request_key(
    *,
    version: str,
    model_name: str,
    info: ModelInfo,
    endpoint: str,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    cache_salt: str,
    tenant: str | None,
) -> str:
    """64 hexadecimal digits. `tenant` None: the answer may be shared among tenants.

    Prompts consist of what JSON can hold. Raises UnicodeEncodeError for text that is not Unicode, which the body's decoder refuses.
    """
    return _digest(
        [
            fingerprint(version, model_name, info),
            endpoint,
            [_ordered(value) for value in _sampling_values(sampling)],
            [(type(prompt).__name__, prompt) for prompt in prompts],
            cache_salt,
            tenant,
        ]
    )


def _ordered(value: object) -> object:
    """`logit_bias` has numbers as keys, which JSON has not."""
    return sorted(value.items()) if isinstance(value, dict) else value


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()
