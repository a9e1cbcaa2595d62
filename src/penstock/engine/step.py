"""What crosses the boundary between scheduling and execution, and nothing else does.

A step is a diff. The runner keeps, per request that it knows, the token ids (prompt and everything sampled so far), the block
table, the number of computed tokens and the sampling state. SchedulerOutput tells it only what changed. Steps are executed
in the order of their ids, and within a step the runner applies, in this order:

    1. forget `finished_keys` and `preempted_keys`
    2. `swap_outs`   device block → host block     (before anything can overwrite the device blocks)
    3. `swap_ins`    host block → device block
    4. `block_copies` device block → device block  (copy on write)
    5. add `new_requests`, apply `cached_requests`
    6. run `num_scheduled_tokens` tokens of each request, starting at its `num_computed_tokens`
    7. for every request whose tokens are then all computed, sample

    token ids  [ computed before | scheduled in this step | later chunks ]
                0 … num_computed   … + num_scheduled        … num_tokens

Draft tokens are guesses at the tokens that a request will sample next. A step that verifies d of them runs 1 + d tokens of the request: the
last one that is known, then the drafts, and samples behind each. The first sample that is not the draft at its place ends the verification,
so that the request gets 1 to 1 + d new tokens, each of them the model's own:

    token ids  [ … | t ][ draft 1 | draft 2 | draft 3 ]      scheduled: 4, from num_computed on
                     │       │         │         │
    sampled          ▼ = 1   ▼ ≠ 2     (not looked at)       new tokens: draft 1 and what was sampled instead of draft 2

Keys and values of refused drafts are overwritten by the next step, which starts at the first refused position.

Sampled tokens stay with the runner: with more than one step in flight, the scheduler schedules the next decode of a request
before it knows the token that this decode starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import SamplingParams, TokenLogprobs

# One sample of one request: f"{request_id}/{index}".
RequestKey = str


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that the runner does not know (first time, or again after preemption), whole.

    `token_ids` holds prompt and output so far. `seed` and `sample_index` with the position of a token give its random numbers. Prompt
    log-probabilities, if asked for, are wanted for the positions from `prompt_logprobs_start` on.
    """

    key: RequestKey
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    sampling: SamplingParams
    seed: int
    sample_index: int
    prompt_logprobs_start: int = 0


@dataclass(frozen=True, slots=True)
class CachedRequest:
    """A request that the runner knows: block ids to append, and where this step's tokens start."""

    key: RequestKey
    new_block_ids: list[int]
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class BlockMove:
    """Copy the whole KV block `source` to `target`."""

    source: int
    target: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step. `num_scheduled_tokens` is ordered; requests that only decode come first, then those that verify drafts.

    `draft_token_ids`: what to verify, for requests that do, which are otherwise computed but for their last token.
    `num_proposals`: how many drafts to propose, when this step is done, for requests that sample in it; they have the blocks for as many
    tokens more. `token_masks`: for requests with a grammar, one mask per sampled position (1 + drafts): bit v % 8 of byte v // 8 says
    whether token v is allowed there.
    """

    step_id: int
    new_requests: list[NewRequest] = field(default_factory=list)
    cached_requests: list[CachedRequest] = field(default_factory=list)
    num_scheduled_tokens: dict[RequestKey, int] = field(default_factory=dict)
    finished_keys: list[RequestKey] = field(default_factory=list)
    preempted_keys: list[RequestKey] = field(default_factory=list)
    block_copies: list[BlockMove] = field(default_factory=list)
    swap_outs: list[BlockMove] = field(default_factory=list)
    swap_ins: list[BlockMove] = field(default_factory=list)
    draft_token_ids: dict[RequestKey, list[int]] = field(default_factory=dict)
    num_proposals: dict[RequestKey, int] = field(default_factory=dict)
    token_masks: dict[RequestKey, list[bytes]] = field(default_factory=dict)

    @property
    def total_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


@dataclass(slots=True)
class RunnerOutput:
    """What a step produced.

    `sampled_token_ids`: for each request that sampled, its new tokens (one, or several under speculation). `logprobs`: one entry per
    sampled token, for requests that asked. `prompt_logprobs`: (position of the first token, entries); the entry at position p belongs
    to prompt token p and was predicted from tokens before it. `errors`: requests that failed alone (such as NaN logits); their other
    fields are absent. `draft_token_ids`: proposals for requests of `num_proposals`, at most as many as wanted; absent where there are
    none. `draft_seconds`: what proposing took. `prepare_seconds`, `forward_seconds`, `sample_seconds`: what the runner's parts of the
    step took of the host's time. On an accelerator, whose work goes on behind the host's back, `device_seconds` is what the step took
    there and `device_idle_seconds` how long the device had nothing to do between the step before and this one; 0 elsewhere.
    """

    step_id: int
    sampled_token_ids: dict[RequestKey, list[int]] = field(default_factory=dict)
    logprobs: dict[RequestKey, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[RequestKey, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    errors: dict[RequestKey, str] = field(default_factory=dict)
    draft_token_ids: dict[RequestKey, list[int]] = field(default_factory=dict)
    draft_seconds: float = 0.0
    prepare_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    device_seconds: float = 0.0
    device_idle_seconds: float = 0.0
