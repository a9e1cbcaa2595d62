"""The types that cross a room or a process; the same structs are the wire format (msgpack through msgspec).

Times are seconds, sizes bytes. Ids inside are ours: `request_id` is made by the frontend and never taken from a client.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.core.errors import ErrorInfo, InvalidRequestError

MAX_SAMPLES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 65_536
SEED_RANGE = (-(2**63), 2**63 - 1)
# Logits are multiplied or divided by it; outside of this range they may become infinite.
REPETITION_PENALTY_RANGE = (0.01, 100.0)

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to turn logits into tokens, and when to stop. Immutable and checked on construction.

    Neutral values switch a knob off: temperature 0 is greedy, top_p 1, top_k 0 (or -1), min_p 0, penalties 0,
    repetition_penalty 1. `logprobs` is the number of alternatives beside the chosen token (None: no log-probabilities);
    they are those of the model's own distribution, before temperature, penalties and filters. `prompt_logprobs` is the same
    for the prompt's tokens. `seed` None means that the frontend draws one.

    Raises InvalidRequestError naming the field when a value is out of OpenAI's (or the stated) bounds.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_range("n", self.n, 1, MAX_SAMPLES)
        check_range("temperature", self.temperature, 0.0, 2.0)
        check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_range("top_k", self.top_k, -1, 2**31 - 1)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_range("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTY_RANGE)
        check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                check_range(name, value, 0, MAX_TOP_LOGPROBS)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}).", param="min_tokens"
                )
        if self.seed is not None:
            check_range("seed", self.seed, *SEED_RANGE)
        self._check_collections()

    def _check_collections(self) -> None:
        check_count("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
                raise InvalidRequestError(
                    f"stop strings must have 1 to {MAX_STOP_STRING_LENGTH} characters.", param="stop"
                )
        check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for bias in self.logit_bias.values():
            check_range("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None:
            check_count("allowed_token_ids", len(self.allowed_token_ids), MAX_ALLOWED_TOKEN_IDS)
            if not self.allowed_token_ids:
                raise InvalidRequestError(
                    "allowed_token_ids is empty; leave it out to allow all.", param="allowed_token_ids"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise InvalidRequestError naming `name` unless low ≤ value ≤ high (low < value with `open_low`); NaN never passes."""
    above = value > low if open_low else value >= low
    if not (above and value <= high):
        bounds = f"{'greater than' if open_low else 'at least'} {low} and at most {high}"
        raise InvalidRequestError(f"{name} must be {bounds}, not {value}.", param=name)


def check_count(name: str, count: int, most: int) -> None:
    """Raise InvalidRequestError naming `name` when it has more than `most` entries."""
    if count > most:
        raise InvalidRequestError(f"{name} has {count} entries; at most {most} are allowed.", param=name)


class SampleStart(msgspec.Struct, frozen=True, array_like=True):
    """One of a request's `n` samples, and the output it already has (when a generation moved here from another engine)."""

    index: int
    output_token_ids: list[int] = []


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the frontend asks of an engine: tokens in, tokens out.

    `sampling.seed` and `sampling.max_tokens` are set (the frontend fills them). `samples` names the samples to run: all of
    0..n-1 with no output for a fresh request, the unfinished ones with their output so far for a resumed one. `attempt`
    counts resubmissions; deltas carry it so that late ones are recognised. `cache_salt` separates prefix caches.
    `priority`: lower is served first. `tenant` and its `weight`: whose share of a busy engine this is. `timeout_s` bounds the whole
    request and `queue_timeout_s` the wait before its first step; both count from arrival at the engine.
    """

    request_id: str
    attempt: int = 0
    prompt_token_ids: list[int]
    sampling: SamplingParams
    samples: list[SampleStart] = []
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    timeout_s: float | None = None
    queue_timeout_s: float | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability and rank (1 = most likely) of one token, and the `top` alternatives, most likely first."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sample of one request, engine → frontend.

    `offset` counts the sample's output tokens before this delta (resumed output included), so that a reader can tell a
    repeated or missing delta. `prompt_logprobs` comes once, with the first delta, one entry per prompt token (None for the first). The
    last delta of a sample has `finish_reason`; `stop_token_id` says which token ended it; `error` is set when it failed.
    """

    request_id: str
    attempt: int
    index: int
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    queue_time_s: float | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine runs. `model_hash` covers configuration and weight files' names and sizes: two engines with the same hash
    continue each other's generations. `kv_cache_tokens` is the capacity of the KV cache, `max_request_tokens` the longest
    prompt + output that a single request can have (the model's context or the cache, whichever is smaller). `weights`: in which
    precision weights are kept ('bfloat16', 'int4 group 32, head int8'); `kernels`: whose arithmetic runs and, if it is not that made for
    the device, why. `device_name`: what a GPU is called; `cuda_graphs`: which there are, or why there are none ('' on a CPU);
    `speculation`: where draft tokens come from ('' without);
    `max_inflight_steps`: 2 when a step is prepared while the one before it runs. `tokenizer_hash` and `template_hash` are the frontend's:
    equal hashes, equal token ids and prompts."""

    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bytes: int
    model_hash: str
    block_size: int = 0
    kv_cache_tokens: int = 0
    kv_cache_bytes: int = 0
    swap_tokens: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    attention_backend: str = ""
    weights: str = ""
    kv_cache_dtype: str = ""
    kernels: str = ""
    device_name: str = ""
    cuda_graphs: str = ""
    max_inflight_steps: int = 1
    threads: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    speculation: str = ""
    tokenizer_hash: str = ""
    template_hash: str = ""

    @property
    def max_request_tokens(self) -> int:
        return min(self.max_model_len, self.kv_cache_tokens)


class LiveLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that can change while the engine runs; None leaves one as it is. Never above the start-up values."""

    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_prefill_tokens_while_decoding: int | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine. Counters count from the engine's start; `uptime_s` tells a restart from a reset."""

    uptime_s: float
    steps: int
    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    host_blocks_total: int = 0
    host_blocks_used: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    step_failures: int = 0
    finished: dict[str, int] = {}
    step_seconds_sum: float = 0.0
    step_seconds_buckets: list[int] = []
    step_tokens_sum: int = 0
    step_tokens_buckets: list[int] = []
    step_phase_seconds: dict[str, float] = {}
    device_seconds: float = 0.0
    device_idle_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    verifications: int = 0
    limits: LiveLimits = LiveLimits()
    resident_bytes: int = 0


# ---- messages, frontend → engine ----


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """First message of a client; the engine answers with Hello."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these requests; each unfinished sample ends with finish_reason "abort". Unknown ids are ignored.

    `indices` restricts the abort to some samples of each request (None: all)."""

    request_ids: list[str]
    indices: list[int] | None = None


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """Change live limits; answered by Configured with the same `call_id`."""

    call_id: int
    limits: LiveLimits


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Keeps a client alive in the engine's eyes; a client silent for CLIENT_TIMEOUT_S is dropped and its requests aborted."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what runs, refuse what comes, then exit."""


class Disconnect(msgspec.Struct, frozen=True, tag="disconnect"):
    """The client leaves; its requests are aborted."""


ToEngine = Connect | Submit | Abort | Configure | Ping | Drain | Disconnect


# ---- messages, engine → frontend ----


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The engine is loaded and warm. `timeline`: start-up phases and the seconds each took."""

    model: ModelInfo
    timeline: list[tuple[str, float]]


class Deltas(msgspec.Struct, frozen=True, tag="deltas"):
    """All news for one client, at most one message per step."""

    deltas: list[TokenDelta]


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Sent at least every STATUS_INTERVAL_S while steps progress, and in answer to Ping. Its absence is how a hung engine shows."""

    stats: EngineStats


class Configured(msgspec.Struct, frozen=True, tag="configured"):
    call_id: int
    limits: LiveLimits
    error: ErrorInfo | None = None


class StartupFailed(msgspec.Struct, frozen=True, tag="startup_failed"):
    """The engine cannot start; `message` is one line with the fix."""

    message: str


FromEngine = Hello | Deltas | Status | Configured | StartupFailed

CLIENT_TIMEOUT_S = 10.0
STATUS_INTERVAL_S = 0.5
PING_INTERVAL_S = 1.0
