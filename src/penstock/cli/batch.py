"""The work of `penstock generate`: input lines → jobs → one engine → output lines in the order of the input."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from penstock.cli.sampling import sampling_params
from penstock.core.config import EngineConfig
from penstock.core.errors import InvalidRequestError, RequestError
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import (
    ChatPrompt,
    Delta,
    EngineClient,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
)

# Requests handed to the engine at once: enough to fill its batch, few enough that a million lines do not wait inside it.
MAX_CONCURRENT = 256


@dataclass(frozen=True, slots=True)
class Job:
    """One input line: what to generate, or why it cannot be."""

    id: Any
    prompt: Prompt | None = None
    sampling: SamplingParams = SamplingParams()
    error: str = ""


@dataclass(slots=True)
class Sample:
    """What one sample has so far."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


def read_lines(text: str, source: str, input_format: str) -> list[tuple[int, Any]]:
    """(line number from 0, prompt or parsed object or JSON error) of every line that is not blank."""
    lines = [(number, line) for number, line in enumerate(text.splitlines()) if line.strip()]
    if input_format == "auto":
        as_json = source.endswith((".jsonl", ".ndjson")) or (
            source == "-" and bool(lines) and lines[0][1].lstrip()[0] == "{"
        )
        input_format = "jsonl" if as_json else "txt"
    if input_format == "txt":
        return [(number, {"prompt": line}) for number, line in lines]
    return [(number, _parse_json(line)) for number, line in lines]


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error


def parse_jobs(lines: Sequence[tuple[int, Any]], defaults: dict[str, Any], *, chat: bool) -> list[Job]:
    """A job per line; a wrong line becomes a job with an error. `defaults` are the sampling flags."""
    return [_parse_job(number, entry, defaults, chat) for number, entry in lines]


def _parse_job(number: int, entry: Any, defaults: dict[str, Any], chat: bool) -> Job:
    if isinstance(entry, ValueError):
        return Job(number, error=f"line {number + 1} is not JSON: {entry}")
    if not isinstance(entry, dict):
        return Job(number, error=f"line {number + 1} is not a JSON object.")
    job_id = entry.get("id", number)
    fields = {name: value for name, value in entry.items() if name not in ("id", "prompt", "messages")}
    try:
        prompt = _parse_prompt(entry, chat)
        return Job(job_id, prompt, sampling_params({**defaults, **fields}))
    except InvalidRequestError as error:
        return Job(job_id, error=error.message)


def _parse_prompt(entry: dict[str, Any], chat: bool) -> Prompt:
    if ("prompt" in entry) == ("messages" in entry):
        raise InvalidRequestError('A line needs either "prompt" or "messages".')
    if "messages" in entry:
        messages = entry["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
        ):
            raise InvalidRequestError('"messages" is a list of objects with "role" and "content".')
        return ChatPrompt(messages)
    prompt = entry["prompt"]
    if isinstance(prompt, str):
        return ChatPrompt([{"role": "user", "content": prompt}]) if chat else TextPrompt(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return TokensPrompt(prompt)
    raise InvalidRequestError('"prompt" is text or a list of token ids.')


async def run(config: EngineConfig, jobs: Sequence[Job], output: TextIO) -> int:
    """Start an engine in this process, run the jobs, write a line for each; the number of failed jobs."""
    from penstock.llm import AsyncLLM

    async with AsyncLLM(config) as engine:
        return await run_jobs(engine, jobs, output)


async def run_jobs(engine: EngineClient, jobs: Sequence[Job], output: TextIO) -> int:
    """Run the jobs on `engine`; lines are written in order as soon as all earlier ones are there."""
    from tqdm import tqdm

    slots = asyncio.Semaphore(MAX_CONCURRENT)
    started = time.monotonic()
    failed = generated = 0
    with tqdm(total=len(jobs), unit="prompt", disable=None, dynamic_ncols=True) as bar:

        async def run_one(job: Job) -> dict[str, Any]:
            nonlocal generated
            async with slots:
                record = await _run_job(engine, job)
            generated += record.get("completion_tokens", 0)
            bar.set_postfix_str(f"{generated / (time.monotonic() - started):.1f} tok/s", refresh=False)
            bar.update()
            return record

        tasks = [asyncio.create_task(run_one(job)) for job in jobs]
        for task in tasks:
            record = await task
            failed += "error" in record
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            output.flush()
    seconds = time.monotonic() - started
    rate = f"{generated} tokens in {seconds:.1f} s ({generated / seconds:.1f} tok/s)"
    print(f"{len(jobs)} prompts, {failed} failed, {rate}", file=sys.stderr)
    return failed


async def _run_job(engine: EngineClient, job: Job) -> dict[str, Any]:
    """The output record of one job; its failure is its own."""
    if job.prompt is None:
        return {"id": job.id, "error": job.error}
    request = GenerationRequest(request_id=f"batch-{uuid.uuid4().hex}", prompt=job.prompt, sampling=job.sampling)
    samples = [Sample() for _ in range(job.sampling.n)]
    last: Delta | None = None
    prompt_logprobs: list[dict[str, Any]] | None = None
    try:
        async for last in engine.generate(request):
            sample = samples[last.index]
            sample.text += last.text
            sample.tokens = last.num_output_tokens
            sample.finish_reason = last.finish_reason or sample.finish_reason
            sample.stop_reason = last.stop_reason if last.stop_reason is not None else sample.stop_reason
            if last.logprobs is not None:
                sample.logprobs = [*(sample.logprobs or []), *last.logprobs]
            if last.prompt_logprobs is not None:
                prompt_logprobs = [_logprob(entry) for entry in last.prompt_logprobs]
    except RequestError as error:
        return {"id": job.id, "error": error.message}
    record = _record(job, samples, last)
    return record if prompt_logprobs is None else {**record, "prompt_logprobs": prompt_logprobs}


def _record(job: Job, samples: list[Sample], last: Delta | None) -> dict[str, Any]:
    usage = {
        "prompt_tokens": last.num_prompt_tokens if last else 0,
        "completion_tokens": sum(sample.tokens for sample in samples),
        "cached_tokens": last.num_cached_tokens if last else 0,
    }
    if len(samples) == 1:
        return {"id": job.id, **_sample_fields(samples[0]), **usage}
    choices = [
        {"index": index, **_sample_fields(sample), "completion_tokens": sample.tokens}
        for index, sample in enumerate(samples)
    ]
    return {"id": job.id, "choices": choices, **usage}


def _sample_fields(sample: Sample) -> dict[str, Any]:
    fields = {"text": sample.text, "finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}
    if sample.logprobs is None:
        return fields
    return {**fields, "logprobs": [_logprob(entry) for entry in sample.logprobs]}


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": t.token_id, "token": t.token, "logprob": t.logprob} for t in entry.top]
    return {"token_id": entry.token_id, "token": entry.token, "logprob": entry.logprob, "top": top}
