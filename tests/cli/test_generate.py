"""`penstock generate`: input forms, order, failing lines, and what a line says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import EngineError
from penstock.serving.frontend.client import ChatPrompt, TextPrompt, TokensPrompt
from penstock.testing.fake_client import Behavior, FakeClient
from tests.cli.conftest import Invoke


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_text_file_to_stdout_in_order(invoke: Invoke, engine: FakeClient, model_folder: str, tmp_path: Path) -> None:
    prompts = [f"prompt number {i}" for i in range(300)]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n")
    result = invoke("generate", model_folder, "-i", str(tmp_path / "p.txt"), "--max-tokens", "16", "--temperature", "0")
    assert result.code == 0
    lines = records(result.out)
    assert [line["id"] for line in lines] == list(range(300))
    assert [line["text"] for line in lines] == [(prompt * 2)[:16] for prompt in prompts]
    assert lines[0] == {
        "id": 0,
        "text": "prompt number 0p",
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_tokens": 16,
        "completion_tokens": 16,
        "cached_tokens": 0,
    }
    assert "300 prompts, 0 failed, 4800 tokens" in result.err
    assert "tok/s" in result.err
    assert all(request.sampling.greedy for request in engine.requests)


def test_json_lines_have_their_own_ids_and_parameters(
    invoke: Invoke, engine: FakeClient, model_folder: str, tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = [
        {"id": "a", "prompt": "abc", "max_tokens": 3},
        {"prompt": [104, 105], "temperature": 0.5, "stop": "x"},
        {"messages": [{"role": "user", "content": "hello"}], "n": 2, "seed": 7, "logit_bias": {"65": -100}},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    target = tmp_path / "out.jsonl"
    result = invoke("generate", model_folder, "-i", str(tmp_path / "p.jsonl"), "-o", str(target), "--max-tokens", "5")
    assert result.code == 0
    assert result.out == ""
    written = records(target.read_text())
    assert [line["id"] for line in written] == ["a", 1, 2]
    assert written[0]["text"] == "abc"
    assert written[0]["completion_tokens"] == 3
    assert [choice["index"] for choice in written[2]["choices"]] == [0, 1]
    assert written[2]["completion_tokens"] == 10

    by_prompt = {type(request.prompt): request for request in engine.requests}
    assert set(by_prompt) == {TextPrompt, TokensPrompt, ChatPrompt}
    assert by_prompt[TokensPrompt].sampling.stop == ("x",)
    assert by_prompt[TokensPrompt].sampling.temperature == 0.5
    assert by_prompt[ChatPrompt].sampling.logit_bias == {65: -100.0}
    assert by_prompt[ChatPrompt].sampling.max_tokens == 5


def test_wrong_lines_fail_alone(invoke: Invoke, engine: FakeClient, model_folder: str, tmp_path: Path) -> None:
    lines = [
        '{"prompt": "good"}',
        "{not json",
        "[1, 2]",
        '{"id": "both", "prompt": "x", "messages": []}',
        '{"prompt": "x", "temprature": 0}',
        '{"prompt": "x", "temperature": "hot"}',
        '{"prompt": "x", "top_p": 2}',
        '{"prompt": [1, "2"]}',
        '{"messages": ["hello"]}',
        '{"prompt": [70000]}',
        '{"prompt": "also good"}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    result = invoke("generate", model_folder, "-i", str(tmp_path / "p.jsonl"), "--max-tokens", "4")
    assert result.code == 1
    written = records(result.out)
    assert [line["id"] for line in written] == [0, 1, 2, "both", *range(4, 11)]
    assert ["error" in line for line in written] == [False] + [True] * 9 + [False]
    assert "line 2 is not JSON" in written[1]["error"]
    assert "Did you mean 'temperature'?" in written[4]["error"]
    assert "top_p must be greater than 0.0 and at most 1.0" in written[6]["error"]
    assert "Token id 70000 is outside the vocabulary." in written[9]["error"]
    assert "11 prompts, 9 failed" in result.err


def test_failure_in_the_engine_is_the_lines_own(
    invoke: Invoke, engine: FakeClient, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.behavior = Behavior(error=EngineError("This request failed."), error_after=2)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    result = invoke("generate", model_folder)
    assert result.code == 1
    assert records(result.out) == [{"id": i, "error": "This request failed."} for i in range(2)]


def test_stdin_as_json_lines_and_chat_template_for_plain_prompts(
    invoke: Invoke, engine: FakeClient, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "hi", "logprobs": 1}\n'))
    result = invoke("generate", model_folder, "--chat", "--max-tokens", "2")
    (line,) = records(result.out)
    assert len(line["logprobs"]) == 2
    assert set(line["logprobs"][0]) == {"token_id", "token", "logprob", "top"}
    assert engine.requests[0].prompt == ChatPrompt([{"role": "user", "content": "hi"}])


def test_unreadable_input(invoke: Invoke, model_folder: str, tmp_path: Path) -> None:
    result = invoke("generate", model_folder, "-i", str(tmp_path / "none.txt"))
    assert result.code == 2
    assert "No such file or directory" in result.err
