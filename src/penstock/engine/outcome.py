"""What sampled tokens mean for a request: which of them it takes, and whether it ends with them."""

from __future__ import annotations

from penstock.core.types import FinishReason, TokenLogprobs
from penstock.engine.plan import Update
from penstock.engine.request import Request
from penstock.engine.step import RunnerOutput


def append_tokens(request: Request, sampled: list[int], logprobs: list[TokenLogprobs] | None) -> Update:
    """Append sampled tokens up to the first that ends the request: a stop token, the last one wanted, or where its grammar ends. A token
    that the grammar does not allow is a mistake of whoever sampled it, and ends this request with an error."""
    if request.max_output_tokens == 0:
        return Update(request, request.num_output_tokens, [], finish_reason="length")
    offset = num_output = request.num_output_tokens
    taken: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id = None
    error = None
    for token_id in sampled:
        if request.matcher is not None and not request.matcher.accept(token_id):
            finish_reason, error = "error", f"token {token_id} was sampled, which the grammar does not allow"
            break
        request.token_ids.append(token_id)
        taken.append(token_id)
        num_output += 1
        if token_id in request.stop_token_ids and num_output > request.sampling.min_tokens:
            finish_reason, stop_token_id = "stop", token_id
        elif request.matcher is not None and request.matcher.is_finished:
            finish_reason = "stop"
        elif num_output >= request.max_output_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            break
    return Update(
        request, offset, taken, logprobs[: len(taken)] if logprobs else None, finish_reason, stop_token_id, error
    )


def keep_prompt_logprobs(request: Request, output: RunnerOutput) -> None:
    """Add what a step has of the log-probabilities of a request's prompt."""
    entry = output.prompt_logprobs.get(request.key)
    if entry is None or request.prompt_logprobs is None:
        return
    start, entries = entry
    # With several steps in flight a preempted request may be told an entry twice.
    request.prompt_logprobs.extend(entries[request.next_prompt_logprob - start :])
