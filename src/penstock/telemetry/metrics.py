"""Every metric, in one table: name, type, labels, buckets and one sentence of help. docs/metrics.md is made from it.

Prometheus conventions: seconds and bytes, `_total` for counters, no unit prefixes. Label values come from bounded sets
(served models, route templates, status classes, outcomes), so that a client cannot make series. Metrics of source "engine" are
filled from EngineStats at the time of the scrape; they count from the engine's start and begin again when it restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["gateway", "engine"]
Outcome = Literal["completed", "invalid", "aborted", "limited", "overloaded", "deadline", "engine_dead", "error"]

# From a token of a small model on a fast GPU (0.5 ms) to a request in a long queue.
LATENCY_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
TOKEN_INTERVAL_BUCKETS_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.025,
    0.04,
    0.06,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
TOKEN_COUNT_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
# The bounds of EngineStats.step_seconds_buckets and .step_tokens_buckets.
STEP_SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# What a step consists of, in this order; `forward` is the model, everything else is what the engine adds.
STEP_PHASES = ("schedule", "prepare", "forward", "sample", "draft", "deliver")
STEP_TOKENS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One row of the table, compared and hashed by identity. `buckets` are the upper bounds of a histogram."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Source = "gateway"


def _engine(name: str, kind: Kind, help: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric("penstock_engine_" + name, kind, help, ("model", *labels), buckets, "engine")


BUILD_INFO = Metric("penstock_build_info", "gauge", "Always 1; the label carries the version.", ("version",))

HTTP_REQUESTS = Metric(
    "penstock_http_requests_total",
    "counter",
    "HTTP requests answered, by route template, method and status class.",
    ("route", "method", "status"),
)
HTTP_REQUEST_SECONDS = Metric(
    "penstock_http_request_seconds",
    "histogram",
    "Time from the head of an HTTP request to the end of its response.",
    ("route",),
    LATENCY_BUCKETS_S,
)
HTTP_IN_FLIGHT = Metric("penstock_http_requests_in_flight", "gauge", "HTTP requests being answered now.")

REQUESTS = Metric(
    "penstock_requests_total",
    "counter",
    "Completion and chat requests that reached a model, by how they ended.",
    ("model", "outcome"),
)
REQUESTS_IN_FLIGHT = Metric(
    "penstock_requests_in_flight", "gauge", "Completion and chat requests being generated now.", ("model",)
)
TIME_TO_FIRST_TOKEN = Metric(
    "penstock_time_to_first_token_seconds",
    "histogram",
    "Time from the acceptance of a request to its first token.",
    ("model",),
    LATENCY_BUCKETS_S,
)
INTER_TOKEN = Metric(
    "penstock_inter_token_seconds",
    "histogram",
    "Time between two output tokens of one sample, as they reach the gateway.",
    ("model",),
    TOKEN_INTERVAL_BUCKETS_S,
)
REQUEST_SECONDS = Metric(
    "penstock_request_seconds",
    "histogram",
    "Time from the acceptance of a completed request to its last token.",
    ("model",),
    LATENCY_BUCKETS_S,
)
QUEUE_SECONDS = Metric(
    "penstock_queue_seconds",
    "histogram",
    "Time that a request waited in the engine before its first step.",
    ("model",),
    LATENCY_BUCKETS_S,
)
PROMPT_TOKENS = Metric("penstock_prompt_tokens_total", "counter", "Prompt tokens of answered requests.", ("model",))
CACHED_PROMPT_TOKENS = Metric(
    "penstock_cached_prompt_tokens_total", "counter", "Prompt tokens that the prefix cache supplied.", ("model",)
)
GENERATION_TOKENS = Metric("penstock_generation_tokens_total", "counter", "Output tokens delivered.", ("model",))
REQUEST_PROMPT_TOKENS = Metric(
    "penstock_request_prompt_tokens", "histogram", "Prompt tokens per request.", ("model",), TOKEN_COUNT_BUCKETS
)
REQUEST_GENERATION_TOKENS = Metric(
    "penstock_request_generation_tokens",
    "histogram",
    "Output tokens per completed request, all samples together.",
    ("model",),
    TOKEN_COUNT_BUCKETS,
)

# ---- identity, limits, cache, admission, stores ----
AUTH_FAILURES = Metric(
    "penstock_auth_failures_total", "counter", "Requests refused for their credentials, by reason.", ("reason",)
)
LIMITED = Metric(
    "penstock_rate_limited_total",
    "counter",
    "Requests refused with 429, by the limit: requests, tokens, concurrency, budget.",
    ("limit",),
)
REFUSED = Metric("penstock_admission_refused_total", "counter", "Requests refused with 503, by reason.", ("reason",))
INFLIGHT_TOKENS = Metric(
    "penstock_admission_tokens_in_flight", "gauge", "Prompt and output tokens reserved in the engine.", ("model",)
)
CACHE_LOOKUPS = Metric(
    "penstock_response_cache_total",
    "counter",
    "Generations by what the response cache did: hit, miss, coalesced, bypass.",
    ("model", "outcome"),
)
CACHE_HIT_SECONDS = Metric(
    "penstock_response_cache_hit_seconds",
    "histogram",
    "Time from the acceptance of a request to its answer from the cache.",
    ("model",),
    LATENCY_BUCKETS_S,
)
CACHE_BYTES = Metric("penstock_response_cache_bytes", "gauge", "Bytes that the response cache in memory holds.")
CACHE_ENTRIES = Metric("penstock_response_cache_entries", "gauge", "Answers that the response cache in memory holds.")
CACHE_EVICTIONS = Metric(
    "penstock_response_cache_evictions_total",
    "counter",
    "Answers dropped from memory, by reason: size, expired.",
    ("reason",),
)
CACHE_DROPPED_WRITES = Metric(
    "penstock_response_cache_dropped_writes_total",
    "counter",
    "Answers not kept because the queue to the store was full.",
)
STORE_ERRORS = Metric(
    "penstock_store_errors_total",
    "counter",
    "Failed operations on Redis, the database or the coordinator, by store and by what they were for.",
    ("store", "purpose"),
)
STORE_UP = Metric("penstock_store_up", "gauge", "1 while a store answers, 0 while it is taken for away.", ("store",))
USAGE_WRITTEN = Metric(
    "penstock_usage_records_total", "counter", "Usage records by fate: written, duplicate, spooled, lost.", ("fate",)
)
USAGE_PENDING = Metric("penstock_usage_records_pending", "gauge", "Usage records that wait to be written.")
GATEWAY_WORKERS = Metric("penstock_gateway_workers", "gauge", "Gateway processes that serve now.")
GATEWAY_WORKER_RESTARTS = Metric(
    "penstock_gateway_worker_restarts_total", "counter", "Gateway processes that ended and were started again."
)

ENGINE_READY = _engine("ready", "gauge", "1 while the engine serves requests, else 0.")
ENGINE_RESTARTS = _engine("restarts_total", "counter", "Restarts of the engine since the server started.")
ENGINE_UPTIME = _engine("uptime_seconds", "gauge", "Time since the engine started.")
ENGINE_STEPS = _engine("steps_total", "counter", "Steps finished.")
ENGINE_STEP_FAILURES = _engine(
    "step_failures_total", "counter", "Steps that failed; their requests were computed again."
)
ENGINE_RUNNING = _engine("requests_running", "gauge", "Samples that take part in steps.")
ENGINE_WAITING = _engine(
    "requests_waiting", "gauge", "Samples that wait for their first step, or again after preemption."
)
ENGINE_KV_BLOCKS = _engine("kv_blocks", "gauge", "KV blocks on the device.")
ENGINE_KV_BLOCKS_USED = _engine("kv_blocks_used", "gauge", "KV blocks held by requests.")
ENGINE_KV_BLOCKS_CACHED = _engine("kv_blocks_cached", "gauge", "Free KV blocks that still hold a reusable prefix.")
ENGINE_KV_USAGE = _engine("kv_usage_ratio", "gauge", "Share of the KV blocks that requests hold, 0 to 1.")
ENGINE_HOST_BLOCKS = _engine("host_blocks", "gauge", "KV blocks of the host-memory tier.")
ENGINE_HOST_BLOCKS_USED = _engine("host_blocks_used", "gauge", "Host-memory blocks that hold a prefix.")
ENGINE_PROMPT_TOKENS = _engine("prompt_tokens_total", "counter", "Prompt tokens computed.")
ENGINE_GENERATION_TOKENS = _engine("generation_tokens_total", "counter", "Tokens sampled.")
ENGINE_PREFIX_QUERIED = _engine("prefix_queried_tokens_total", "counter", "Tokens looked up in the prefix cache.")
ENGINE_PREFIX_HIT = _engine("prefix_hit_tokens_total", "counter", "Tokens found in the prefix cache.")
ENGINE_PREEMPTIONS = _engine("preemptions_total", "counter", "Samples that lost their blocks and were computed again.")
ENGINE_SWAPPED_OUT = _engine("swapped_out_blocks_total", "counter", "Blocks written to the host-memory tier.")
ENGINE_SWAPPED_IN = _engine("swapped_in_blocks_total", "counter", "Blocks restored from the host-memory tier.")
ENGINE_FINISHED = _engine("finished_samples_total", "counter", "Samples finished, by reason.", "reason")
ENGINE_STEP_SECONDS = _engine("step_seconds", "histogram", "Duration of a step.", buckets=STEP_SECONDS_BUCKETS)
ENGINE_STEP_TOKENS = _engine("step_tokens", "histogram", "Tokens computed in a step.", buckets=STEP_TOKENS_BUCKETS)
ENGINE_STEP_PHASE_SECONDS = _engine(
    "step_phase_seconds_total",
    "counter",
    "Time spent in the parts of steps: schedule, prepare, forward, sample, draft (proposing tokens to verify), deliver.",
    "phase",
)
ENGINE_DEVICE_SECONDS = _engine(
    "device_seconds_total",
    "counter",
    "Time that an accelerator spent on steps, from the first work of each to the last; 0 on a CPU.",
)
ENGINE_DEVICE_IDLE_SECONDS = _engine(
    "device_idle_seconds_total",
    "counter",
    "Time that an accelerator waited between two steps although there was work: what scheduling and preparing steps took that was not "
    "hidden behind the step before. Its share, which should stay below 0.05: "
    "`rate(penstock_engine_device_idle_seconds_total[5m]) / (rate(penstock_engine_device_idle_seconds_total[5m]) + "
    "rate(penstock_engine_device_seconds_total[5m]))`.",
)
ENGINE_DRAFT_TOKENS = _engine("draft_tokens_total", "counter", "Draft tokens verified under speculative decoding.")
ENGINE_ACCEPTED_DRAFT_TOKENS = _engine(
    "accepted_draft_tokens_total",
    "counter",
    "Draft tokens that were right and became output. The acceptance rate: "
    "`rate(penstock_engine_accepted_draft_tokens_total[5m]) / rate(penstock_engine_draft_tokens_total[5m])`.",
)
ENGINE_VERIFICATIONS = _engine(
    "verifications_total",
    "counter",
    "Steps of single samples that verified draft tokens; each gives one token more than it accepts. Tokens per such step: "
    "`1 + rate(penstock_engine_accepted_draft_tokens_total[5m]) / rate(penstock_engine_verifications_total[5m])`.",
)
ENGINE_LIMIT = _engine("limit", "gauge", "The live limits in force, by name.", "name")
ENGINE_RESIDENT_BYTES = _engine("resident_memory_bytes", "gauge", "Resident memory of the engine process.")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
