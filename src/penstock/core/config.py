"""Every setting, once, typed, with its default and its sentence of help. The command line and docs/configuration.md are made from these.

`help`, `choices` and `unit` are field metadata. An environment variable PENSTOCK_<FIELD> (upper case) sets a field that no flag
sets. Validation happens in `__post_init__`; a wrong value is a ConfigError that names the flag.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from penstock.core.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
EMBEDDED_MODEL = "stories"
# The embedded model's draft model.
EMBEDDED_DRAFT = "stories-draft"
# --speculative-model without a model: drafts repeat what followed the same tokens earlier in the request.
NGRAM = "ngram"
MAX_SPECULATIVE_TOKENS = 16


def setting(default: Any, help: str, *, choices: tuple[str, ...] | None = None, flag: str | None = None) -> Any:
    """A dataclass field with what the command line and the documentation need to know about it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine."""

    model: str = setting(
        EMBEDDED_MODEL, "Model folder, GGUF file, hub name, or 'stories' for the embedded model.", flag="(argument)"
    )
    revision: str | None = setting(None, "Revision (branch, tag or commit) of a hub model.")
    load_format: str = setting(
        "auto",
        "Where weights come from: safetensors files ('auto') or random numbers in the shape of config.json ('dummy').",
        choices=("auto", "dummy"),
    )
    dtype: DType = setting(
        "auto",
        "Arithmetic type. 'auto': the checkpoint's on a GPU, float32 too; on a CPU float32 unless it has bf16 units.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "Device to run on.", choices=("auto", "cpu", "cuda"))
    quantization: str = setting(
        "auto",
        "Precision of the weights. 'auto' keeps the checkpoint's; 'none' computes quantised ones as floats; 'int8' and 'int4' round "
        "while loading, and so does 'fp8' on a GPU; 'awq', 'gptq' and 'bitsandbytes' insist on a checkpoint in that format.",
        choices=("auto", "none", "int8", "int4", "fp8", "awq", "gptq", "bitsandbytes"),
    )
    quantization_group_size: int = setting(
        32,
        "Input features that share a scale with --quantization int4: 32, 64 or 128. Smaller is more exact, larger is faster.",
    )
    weight_cache: bool = setting(
        True,
        "Keep weights that were quantised or repacked at load in a cache on disk, so that the next start maps them.",
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Type of the KV cache. 'auto': that of the arithmetic. 'int8' and, on a GPU, 'fp8' take a byte a number and round keys and "
        "values; models known not to bear rounded keys keep those in 16 bits on a GPU.",
        choices=("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
    )
    attention_backend: str = setting(
        "auto",
        "Attention implementation; 'auto' takes the fastest for the device and says which and why.",
        choices=("auto", "torch", "native", "triton", "flashinfer", "flash-attention"),
    )
    enforce_eager: bool = setting(
        False, "Launch every GPU kernel of a decode step by itself instead of replaying CUDA graphs."
    )
    cuda_graph_max_batch_size: int = setting(
        0,
        "Largest decode batch that has a CUDA graph; 0: --max-num-seqs, at most 512. Fewer graphs start faster and take less memory.",
    )
    overlap_scheduling: str = setting(
        "auto",
        "Schedule and prepare a step while the one before it runs. 'auto': on a GPU.",
        choices=("auto", "on", "off"),
    )
    threads: int = setting(0, "CPU threads for arithmetic; 0 takes one for each core that this process may use.")
    cpus: str = setting(
        "",
        "CPUs that the engine's threads run on, such as 0-7,16; empty: all. The CPUs of one NUMA node keep memory near.",
    )
    seed: int = setting(0, "Seed of dummy weights.")
    max_model_len: int = setting(0, "Longest prompt plus output in tokens; 0 takes the model's own limit.")
    block_size: int = setting(16, "Tokens per KV block; on a GPU a multiple of 16.")
    memory_utilization: float = setting(
        0.0, "Share of the device's free memory that weights and KV cache may take; 0: 0.9 on a GPU, 0.5 on a CPU."
    )
    kv_cache_gib: float = setting(0.0, "Size of the KV cache in GiB; 0 sizes it from --memory-utilization.")
    swap_space_gib: float = setting(0.0, "Host memory in GiB for evicted KV blocks; 0 switches the host tier off.")
    prefix_caching: bool = setting(True, "Reuse the KV blocks of equal prefixes.")
    max_num_batched_tokens: int = setting(
        0, "Token budget of one step; 0: 512 on a CPU, 8192 on a GPU. Can be lowered and raised back while running."
    )
    max_num_seqs: int = setting(
        0, "Most requests in one step; 0: 64 on a CPU, 256 on a GPU. Can be lowered and raised back while running."
    )
    max_prefill_tokens_while_decoding: int = setting(
        0,
        "Most prompt tokens in a step in which others decode; 0: an eighth of the token budget. Keeps their rhythm steady.",
    )
    tensor_parallel_size: int = setting(
        1, "Ranks that each layer is split over: heads, experts, columns and rows of weights, the vocabulary."
    )
    pipeline_parallel_size: int = setting(
        1, "Stages that the layers are divided into, one after the other; times --tensor-parallel-size ranks in all."
    )
    worker_address: str = setting(
        "",
        "HOST:PORT that ranks of other machines join ('penstock worker --join HOST:PORT'); empty: all ranks are on this one.",
    )
    local_ranks: int = setting(
        0, "Ranks that run on this machine, the first ones; 0: all. The others join at --worker-address."
    )
    speculative_model: str = setting(
        "",
        "Where draft tokens come from, which the model verifies several at a time: 'ngram' (repeats what followed the same words before), "
        "or a smaller model with the same vocabulary, named like MODEL ('stories-draft' for the embedded one). Empty: no speculation.",
    )
    num_speculative_tokens: int = setting(
        0,
        "Draft tokens per request and step; 0: as many as pay, request by request, none when the batch keeps the device busy anyway.",
    )
    scheduling_policy: str = setting(
        "fair",
        "Order of requests. 'fair': tenants share the engine by weight, and within a tenant priority, then arrival decides; 'priority': "
        "the same without tenants; 'fcfs': arrival only. A waiting request gains a level of priority every 10 s.",
        choices=("fair", "priority", "fcfs"),
    )
    max_waiting_requests: int = setting(1024, "Most requests waiting in the engine; more are refused with 503.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, "threads", 0)
        check_at_least(self, "max_model_len", 0)
        check_at_least(self, "max_num_batched_tokens", 0)
        check_at_least(self, "max_num_seqs", 0)
        check_at_least(self, "max_prefill_tokens_while_decoding", 0)
        check_at_least(self, "max_waiting_requests", 1)
        check_at_least(self, "tensor_parallel_size", 1)
        check_at_least(self, "pipeline_parallel_size", 1)
        check_at_least(self, "local_ranks", 0)
        check_at_least(self, "kv_cache_gib", 0)
        check_at_least(self, "cuda_graph_max_batch_size", 0)
        check_at_least(self, "swap_space_gib", 0)
        if not 0 <= self.memory_utilization <= 1:
            raise ConfigError(
                f"{flag_name('memory_utilization')} must be between 0 and 1, not {self.memory_utilization}."
            )
        if self.quantization_group_size not in (32, 64, 128):
            raise ConfigError(
                f"{flag_name('quantization_group_size')} must be 32, 64 or 128, not {self.quantization_group_size}."
            )
        if not 1 <= self.block_size <= 1024:
            raise ConfigError(f"{flag_name('block_size')} must be between 1 and 1024, not {self.block_size}.")
        self._check_ranks()
        if not 0 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"{flag_name('num_speculative_tokens')} must be between 0 and {MAX_SPECULATIVE_TOKENS}, not {self.num_speculative_tokens}."
            )
        if self.num_speculative_tokens and not self.speculative_model:
            raise ConfigError("--num-speculative-tokens needs --speculative-model: 'ngram' or a draft model.")
        if self.swap_space_gib and not self.prefix_caching:
            raise ConfigError(
                "--swap-space-gib keeps evicted prefix blocks, so it needs prefix caching; drop --no-prefix-caching."
            )

    @property
    def num_ranks(self) -> int:
        """Processes that hold a part of the model each."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def _check_ranks(self) -> None:
        if self.local_ranks > self.num_ranks:
            raise ConfigError(
                f"--local-ranks {self.local_ranks} is above the {self.num_ranks} ranks of --tensor-parallel-size times "
                "--pipeline-parallel-size; lower it."
            )
        if self.local_ranks and self.local_ranks < self.num_ranks and not self.worker_address:
            raise ConfigError(
                f"--local-ranks {self.local_ranks} leaves {self.num_ranks - self.local_ranks} ranks to other machines: give "
                "--worker-address HOST:PORT, where they join."
            )
        if self.worker_address:
            host, _, port = self.worker_address.rpartition(":")
            if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
                raise ConfigError(f"--worker-address must be HOST:PORT, not {self.worker_address!r}.")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server and of the supervision of its engine."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: str | None = setting(None, "Name of the model in the API; the model's own name if not given.")
    max_body_bytes: int = setting(8 * 2**20, "Largest request body in bytes; larger ones get 413.")
    request_timeout_s: float = setting(600.0, "Longest a request may take in seconds; then it ends with 504.")
    stream_coalesce_s: float = setting(
        0.01, "After a stream's first token, collect tokens for up to this many seconds per event."
    )
    sse_ping_s: float = setting(15.0, "Send a comment line on a stream that was silent for this many seconds.")
    drain_timeout_s: float = setting(30.0, "On shutdown, give running requests this many seconds to finish.")
    hang_timeout_s: float = setting(
        60.0, "Restart the engine when work waits and no step finishes for this many seconds."
    )
    max_restarts: int = setting(5, "Give up after this many engine restarts without a finished request between them.")
    log_level: str = setting("info", "Verbosity of the log.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "Form of log lines.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {self.port}.")
        check_at_least(self, "max_body_bytes", 1024)
        check_at_least(self, "stream_coalesce_s", 0)
        check_at_least(self, "max_restarts", 0)
        for name in ("request_timeout_s", "sse_ping_s", "drain_timeout_s", "hang_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{flag_name(name)} must be above 0, not {getattr(self, name)}.")


def flag_name(field_name: str) -> str:
    """The command-line flag of a field."""
    return "--" + field_name.replace("_", "-")


def check_choices(config: Any) -> None:
    """Raise ConfigError for the first field whose value is not among its declared choices."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices and value not in choices:
            raise ConfigError(f"{flag_name(field.name)} must be one of {', '.join(choices)}, not {value!r}.")


def check_at_least(config: Any, name: str, low: float) -> None:
    """Raise ConfigError when the named field is below `low` (or not a number)."""
    value = getattr(config, name)
    if not value >= low:
        raise ConfigError(f"{flag_name(name)} must be at least {low}, not {value}.")
