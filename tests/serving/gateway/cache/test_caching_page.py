"""docs/caching.md: its examples run against a real server, and the rows of its table are what the policy does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.cache.interface import CLAIM_S
from penstock.serving.gateway.cache.memory_store import LARGEST_PART
from penstock.serving.gateway.cache.policy import make_plan
from penstock.serving.gateway.cache.redis_store import MAX_VALUE_BYTES
from penstock.serving.gateway.schemas.completions import CompletionBody
from penstock.serving.gateway.schemas.sampling import MAX_CACHE_TTL_S
from penstock.testing.gateway_server import MODEL, GatewayServer

PAGE = (Path(__file__).parents[4] / "docs" / "caching.md").read_text()
BLOCKS = re.findall(r"(<!-- run -->\n)?```(\w+)\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| `(\{.*?\})` \| (?:`(.*?)` )?\| (yes|no) \| (yes|no) \| (yes|no) \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def server() -> Iterator[GatewayServer]:
    with GatewayServer(settings=GatewayConfig(auth="none")) as server:
        yield server


def test_every_block_is_run() -> None:
    assert [bool(marked) for marked, _, _ in BLOCKS] == [True] * 3
    assert {language for _, language, _ in BLOCKS} == {"shell", "python"}


@pytest.mark.parametrize(("language", "text"), [block[1:] for block in BLOCKS])
def test_examples_work_as_they_stand(server: GatewayServer, tmp_path: Path, language: str, text: str) -> None:
    text = (
        text.replace("http://localhost:8000", server.url)
        .replace("localhost:8000", server.url)
        .replace("stories", MODEL)
    )
    if language == "python":
        names: dict[str, Any] = {}
        try:
            exec(compile(text, "docs/caching.md", "exec"), names)  # noqa: S102
        finally:
            if "client" in names:
                names["client"].close()
        return
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["bash", "-xeuo", "pipefail", "-c", text]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_table_has_rows() -> None:
    assert len(ROWS) == 13


@pytest.mark.parametrize(("body", "header", "used", "joins", "kept"), ROWS)
def test_the_table_says_what_is_done(body: str, header: str, used: str, joins: str, kept: str) -> None:
    parsed = CompletionBody.parse({"model": "m", "prompt": "x", **json.loads(body)})
    plan = make_plan(
        lambda: "a" * 64,
        sampling=parsed.sampling(),
        client_seed=parsed.seed is not None,
        headers=[(b"cache-control", header.encode())] if header else [],
        options=parsed.cache,
        default_ttl_s=1.0,
    )
    assert (plan.key is not None) == (kept == "yes")
    assert plan.may_read == (used == "yes") == (joins == "yes")


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    assert (MAX_CACHE_TTL_S, GatewayConfig().response_cache_ttl_s, CLAIM_S) == (86_400, 3600, 10)
    assert (MAX_VALUE_BYTES, LARGEST_PART) == (4 * 2**20, 8)
