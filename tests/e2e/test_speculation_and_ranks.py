"""The official client against servers that speculate or spread the model over processes: they answer as the plain server does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.core.types import STATUS_INTERVAL_S
from penstock.testing.server import RunningServer

SERVER = ("--kv-cache-gib", "0.05", "--threads", "1")
FOX = "Write a single paragraph moral story for children about a fox who learns the value of honesty in a forest."
OWL = "Write a single paragraph moral story for children about an owl who learns the value of patience on a farm."

# What a request may ask for that has to do with how tokens are chosen.
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 90},
    "two samples": {"temperature": 0.9, "seed": 11, "n": 2, "max_tokens": 50},
    "filters and log-probabilities": {
        "temperature": 1.1,
        "top_p": 0.9,
        "seed": 5,
        "max_tokens": 40,
        "logprobs": True,
        "top_logprobs": 3,
    },
    "penalties and a bias": {
        "temperature": 0.8,
        "seed": 3,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "logit_bias": {"300": -5},
        "max_tokens": 40,
    },
    "a stop string": {"temperature": 0.0, "stop": ["she "], "max_tokens": 90},
    "at least so many": {
        "temperature": 0.9,
        "seed": 8,
        "max_tokens": 60,
        "extra_body": {"min_tokens": 50, "repetition_penalty": 1.2},
    },
}


def connect(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={"Cache-Control": "no-store"},
        timeout=90,
    )


def answer(client: openai.OpenAI, conversation: tuple[str, ...], request: dict[str, Any]) -> list[Any]:
    """For each choice: its text, why it ended, and its tokens with their log-probabilities to three digits. Of a conversation, every
    other part is the model's."""
    messages: Any = [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(conversation)
    ]
    completion = client.chat.completions.create(model="stories", messages=messages, **request)
    found: list[Any] = []
    for choice in completion.choices:
        entries = choice.logprobs.content if choice.logprobs is not None and choice.logprobs.content else []
        probabilities = [(entry.token, round(entry.logprob, 3), len(entry.top_logprobs)) for entry in entries]
        found.append((choice.message.content, choice.finish_reason, probabilities))
    return [*found, completion.usage and completion.usage.completion_tokens]


def streamed(client: openai.OpenAI, question: str, request: dict[str, Any]) -> tuple[str, str | None]:
    """The text of a stream, and how it ended, which it did once."""
    text, ends = "", []
    for chunk in client.chat.completions.create(
        model="stories", messages=[{"role": "user", "content": question}], stream=True, **request
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.finish_reason is not None:
                ends.append(choice.finish_reason)
    assert len(ends) == 1
    return text, ends[0]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--speculative-model", "stories-draft", "--num-speculative-tokens", "4"), id="draft model"),
        pytest.param(("--speculative-model", "ngram", "--num-speculative-tokens", "3"), id="n-grams"),
        pytest.param(("--speculative-model", "stories-draft"), id="auto", marks=pytest.mark.slow),
        pytest.param(
            ("--pipeline-parallel-size", "2", "--speculative-model", "stories-draft", "--num-speculative-tokens", "3"),
            id="two stages and a draft model",
        ),
        pytest.param(("--tensor-parallel-size", "2"), id="two tensor ranks"),
    ],
)
def test_answers_are_those_of_the_plain_server(client: openai.OpenAI, tmp_path: Path, flags: tuple[str, ...]) -> None:
    questions = [((question,), request) for request in REQUESTS.values() for question in (FOX, OWL)]
    greedy = REQUESTS["greedy"]
    with (
        RunningServer("stories", *SERVER, *flags, log=tmp_path / "log") as server,
        connect(server) as other,
        ThreadPoolExecutor(6) as threads,
    ):
        expected = list(threads.map(lambda asked: answer(client, *asked), questions))
        found = list(threads.map(lambda asked: answer(other, *asked), questions))
        if "--tensor-parallel-size" in flags:
            # Sums over ranks are rounded differently, by less than what is compared here of log-probabilities of a model this size.
            assert [[part[:2] for part in one[:-1]] for one in found] == [
                [part[:2] for part in one[:-1]] for one in expected
            ]
        else:
            assert found == expected
        assert streamed(other, FOX, greedy) == streamed(client, FOX, greedy)
        # The second answer to a question repeats the first one in parts, which n-grams find.
        again = (FOX, expected[0][0][0], FOX)
        assert answer(other, again, greedy) == answer(client, again, greedy)
        time.sleep(1.5 * STATUS_INTERVAL_S)  # what the engine counts comes from time to time
        drafts = server.metric("penstock_engine_draft_tokens_total")
        accepted = server.metric("penstock_engine_accepted_draft_tokens_total")
        assert server.metric("penstock_engine_verifications_total") <= drafts
        if "--num-speculative-tokens" in flags:
            assert 0 < accepted < drafts
        assert server.interrupt() == 0
    report = (tmp_path / "log").read_text()
    assert ("ranks   " in report) == ("parallel" in "".join(flags))
    assert ("speculation  " in report) == ("--speculative-model" in flags)


def test_a_draft_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from penstock.testing.checkpoints import write_tiny_checkpoint
    from penstock.testing.server import ServerFailedError

    draft = write_tiny_checkpoint(tmp_path / "tiny")
    with (
        pytest.raises(ServerFailedError, match=r"--speculative-model tiny has a vocabulary of 272 tokens"),
        RunningServer("stories", *SERVER, "--speculative-model", str(draft), log=tmp_path / "log"),
    ):
        pass
