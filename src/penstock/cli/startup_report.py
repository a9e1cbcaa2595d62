"""What `penstock serve` prints when it is ready: where the time went, what is in force, and a line to try."""

from __future__ import annotations

import dataclasses
import json
import re

from penstock.core.config import EngineConfig, ServerConfig, flag_name
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import Hello, ModelInfo

_GIB = 2**30
# Below this a model lives in the processor's caches, and rounding its weights gains little.
_WORTH_QUANTISING = 64 * 2**20
# What the report calls weights that are not quantised, "" where it says nothing.
_PLAIN_WEIGHTS = ("", "float32", "bfloat16", "float16")


def startup_report(
    engine: EngineConfig,
    server: ServerConfig,
    gateway: GatewayConfig,
    hello: Hello,
    model_name: str,
    url: str,
    seconds: float,
) -> str:
    """`seconds`: from the start of the process to now. The numbers in `hello` are those that 0 and 'auto' became; so is `gateway.auth`."""
    phases = "  ".join(f"{name} {duration:.2f} s" for name, duration in hello.timeline)
    return "\n".join(
        [
            f"Penstock serves {model_name} at {url}/v1",
            f"  start-up       {phases}  ready {seconds:.2f} s",
            *(f"  {label:<14} {text}" for label, text in [*_facts(hello.model), *_gateway_facts(gateway)]),
            f"  settings       {_settings(engine, server, gateway)}",
            "",
            "Try it:",
            f"  {curl_line(url, model_name, with_key=bool(gateway.auth_methods))}",
        ]
    )


def _facts(model: ModelInfo) -> list[tuple[str, str]]:
    swap = f", {model.swap_tokens:,} more on the host" if model.swap_tokens else ""
    return [
        (
            "model",
            f"{model.architecture}, {model.num_parameters / 1e6:,.1f} M parameters, {model.weight_bytes / _GIB:.2f} GiB",
        ),
        ("runs on", _runs_on(model)),
        ("precision", _precision(model)),
        ("context", f"{model.max_model_len:,} tokens"),
        (
            "KV cache",
            f"{model.kv_cache_tokens:,} tokens in blocks of {model.block_size}, {model.kv_cache_bytes / _GIB:.2f} GiB{swap}",
        ),
        ("batch", f"up to {model.max_num_seqs} requests and {model.max_num_batched_tokens:,} tokens per step"),
        *([("steps", _steps(model))] if model.cuda_graphs else []),
        *([("ranks", _ranks(model))] if model.tensor_parallel_size * model.pipeline_parallel_size > 1 else []),
        *([("speculation", model.speculation)] if model.speculation else []),
    ]


def _runs_on(model: ModelInfo) -> str:
    name = f" ({model.device_name})" if model.device_name else ""
    threads = f" with {model.threads} threads" if model.threads else ""
    kernels = f", {model.kernels}" if model.kernels else ""
    return f"{model.device}{name}{threads}{kernels}, attention by {model.attention_backend}"


def _ranks(model: ModelInfo) -> str:
    """How the model is spread over processes."""
    tensor, stages = model.tensor_parallel_size, model.pipeline_parallel_size
    parts = [f"every layer over {tensor}"] if tensor > 1 else []
    parts += [f"the layers over {stages} stages"] if stages > 1 else []
    return f"{tensor * stages} processes: {', '.join(parts)}"


def _steps(model: ModelInfo) -> str:
    """How a GPU is kept busy."""
    prepared = "while the one before it runs" if model.max_inflight_steps > 1 else "when the one before it is done"
    return f"{model.cuda_graphs}; each prepared {prepared}"


def _precision(model: ModelInfo) -> str:
    """What runs in which precision, and what would be faster: a choice that is never made silently."""
    text = f"weights {model.weights or model.dtype}, arithmetic {model.dtype}, KV cache {model.kv_cache_dtype or model.dtype}"
    if model.device == "cuda" and model.dtype == "float32":
        text += "; this is the checkpoint's type, --dtype bfloat16 reads half the bytes per token"
    if model.device == "cpu" and model.weight_bytes >= _WORTH_QUANTISING and model.weights in _PLAIN_WEIGHTS:
        text += "; --quantization int8 or int4 would read fewer bytes per token"
    return text


def _gateway_facts(gateway: GatewayConfig) -> list[tuple[str, str]]:
    """Who may ask, and what is shared with whom."""
    methods = gateway.auth_methods
    access = f"with {' or '.join(methods)}" if methods else "everybody who reaches this address, without authentication"
    cache = gateway.response_cache
    if cache == "auto":
        cache = "redis" if gateway.redis_url else "memory"
    kept = f"response cache in {cache}" if cache != "off" else "no response cache"
    workers = f", {gateway.gateway_workers} gateway processes" if gateway.gateway_workers > 1 else ""
    return [("access", access), ("gateway", kept + workers)]


def _settings(*configs: EngineConfig | ServerConfig | GatewayConfig) -> str:
    """The settings that differ from their defaults."""
    changed = []
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != field.default and field.name not in ("model", "auth"):
                changed.append(f"{flag_name(field.name)} {_without_password(str(value))}")
    return " ".join(changed) or "all defaults (penstock serve --help)"


def _without_password(value: str) -> str:
    """`scheme://user:password@host` without the password."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", value)


def curl_line(url: str, model_name: str, *, with_key: bool) -> str:
    """A request to paste into a shell."""
    message = (
        "Write a single paragraph moral story for children about a fox who learns the value of honesty in a forest."
    )
    body = {"model": model_name, "messages": [{"role": "user", "content": message}], "max_tokens": 200}
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
