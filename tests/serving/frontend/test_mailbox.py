"""A slow reader gets merged deltas; the outcome comes once, after everything that was put before it."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.errors import AbortedError, EngineError
from penstock.core.types import FinishReason
from penstock.serving.frontend.client import Delta, TokenLogprob
from penstock.serving.frontend.mailbox import Mailbox


def make_delta(index: int, offset: int, text: str, finish: FinishReason | None = None) -> Delta:
    ids = [ord(char) for char in text]
    return Delta(
        index=index,
        text=text,
        token_ids=ids,
        offset=offset,
        num_output_tokens=offset + len(ids),
        num_prompt_tokens=3,
        logprobs=[TokenLogprob(token_id, chr(token_id), b"", -1.0) for token_id in ids],
        prompt_token_ids=[1, 2, 3] if offset == 0 else None,
        finish_reason=finish,
        stop_reason="." if finish else None,
    )


async def test_pending_deltas_of_a_sample_merge() -> None:
    mailbox = Mailbox()
    mailbox.put(make_delta(0, 0, "ab"))
    mailbox.put(make_delta(1, 0, "x"))
    mailbox.put(make_delta(0, 2, "c"))
    mailbox.put(make_delta(0, 3, "d", "stop"))
    first, second = await mailbox.get(), await mailbox.get()
    assert first is not None
    assert second is not None
    assert (first.index, first.text, first.offset, first.num_output_tokens) == (0, "abcd", 0, 4)
    assert (first.finish_reason, first.stop_reason, first.prompt_token_ids) == ("stop", ".", [1, 2, 3])
    assert first.logprobs is not None
    assert [entry.token_id for entry in first.logprobs] == first.token_ids
    assert (second.index, second.text) == (1, "x")


async def test_a_waiting_reader_wakes_up() -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put(make_delta(0, 0, "a"))
    delta = await asyncio.wait_for(reader, 1)
    assert delta is not None
    assert delta.text == "a"


async def test_what_came_before_an_error_is_delivered_first_and_only_the_first_outcome_counts() -> None:
    mailbox = Mailbox()
    mailbox.put(make_delta(0, 0, "a"))
    mailbox.close(EngineError("first"))
    mailbox.close(AbortedError("second"))
    mailbox.put(make_delta(0, 1, "late"))
    delta = await mailbox.get()
    assert delta is not None
    assert delta.text == "a"
    for _ in range(2):
        with pytest.raises(EngineError, match="first"):
            await mailbox.get()


async def test_the_end_is_none() -> None:
    mailbox = Mailbox()
    mailbox.close()
    assert await mailbox.get() is None
    assert mailbox.closed
