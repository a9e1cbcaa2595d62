"""The forward context: set for one pass, in one thread, never nested."""

from __future__ import annotations

import threading

import pytest
import torch

from penstock.core.errors import IntegrityError
from penstock.execution.attention.context import ForwardContext, forward_context, get_forward_context
from penstock.testing.paged_model import make_metadata


def make_context() -> ForwardContext:
    return ForwardContext(make_metadata([[0]], [3], [3], 16, torch.device("cpu")), [])


def test_context_is_current_inside_and_gone_outside() -> None:
    context = make_context()
    with forward_context(context):
        assert get_forward_context() is context
    with pytest.raises(IntegrityError, match="no forward context"):
        get_forward_context()


def test_context_is_gone_after_an_exception() -> None:
    with pytest.raises(RuntimeError, match="boom"), forward_context(make_context()):
        raise RuntimeError("boom")
    with pytest.raises(IntegrityError):
        get_forward_context()


def test_contexts_do_not_nest() -> None:
    context = make_context()
    with forward_context(context):
        with pytest.raises(IntegrityError, match="nest"), forward_context(make_context()):
            pass
        assert get_forward_context() is context


def test_threads_do_not_see_each_other() -> None:
    seen: list[bool] = []

    def other() -> None:
        with forward_context(make_context()):
            seen.append(True)

    with forward_context(make_context()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [True]


def test_metadata_counts() -> None:
    metadata = make_metadata([[3], [5, 1], [2]], [4, 20, 6], [1, 1, 6], 16, torch.device("cpu"))
    assert (metadata.num_requests, metadata.num_tokens, metadata.num_decodes, metadata.max_seq_len) == (3, 8, 2, 20)
    assert metadata.slot_mapping.tolist() == [51, 19, 32, 33, 34, 35, 36, 37]
